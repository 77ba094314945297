//! What can be asked of the daemon, and how?
//!
//! HTTP/1.1 with JSON over a Unix socket. `docs/openapi.json` describes it and is tested against the routes here.
//! `routes` is the daemon's side, `client` the side of the commands, `types` what travels between them.

pub mod client;
pub mod routes;
pub mod types;
