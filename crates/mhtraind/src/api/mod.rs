//! What can be asked of the daemon, and how?
//!
//! HTTP/1.1 with JSON over a Unix socket. `docs/openapi.json` describes it and is tested against the routes here.
//! `connections` takes clients in; `routes` is the table of what is answered and by whom; `client` is the side of the commands; `types` is what travels
//! between them.

pub mod client;
mod connections;
mod jobs;
pub mod routes;
mod streams;
mod submit;
pub mod types;
