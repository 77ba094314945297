//! How much memory will a fine-tuning run need, and which shape of it is the best that fits?
//!
//! Pure: values in, values out. No clock, no file, no device. The plan puts the rungs of the ladder in order,
//! lets the estimate predict the peak of each, and chooses. The estimate replays what each kind of block takes and gives
//! back (`block`, `tape`, `pass`), and adds what the allocator keeps beyond that (`reserve`), corrected by earlier runs on
//! the same machine (`learn`). Which rung is the faster one is `cost`'s, and how
//! long a step takes is `pace`'s.
//!
//! It does not know ms-swift's flags (crate `mhtrain-swift`) nor what to do after a failure (`mhtrain-job`).

mod block;
pub mod catalogue;
pub mod correct;
pub mod cost;
pub mod data;
pub mod estimate;
pub mod estimate_request;
pub mod explain;
pub mod gpu;
pub mod known;
pub mod ladder;
pub mod learn;
pub mod model;
pub mod observation;
pub mod pace;
mod pass;
pub mod plan;
pub mod request;
pub mod reserve;
mod tape;
pub mod tier;
pub mod unique_json;
pub mod units;
pub mod workload;
