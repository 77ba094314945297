//! What can this machine offer to a job, right now?
//!
//! The shell around NVML, sysinfo, the trainer's Python and the files of models and data sets. Every module asks one
//! of them and answers with plain values; "cannot be read" is a value too. Nothing here decides what to do with them.
//!
//! Left out on purpose: MIG slices (a card with MIG on is listed and refused), AMD cards, other machines.

pub mod content_hash;
pub mod data_files;
pub mod doctor;
pub mod gpu;
pub mod host;
pub mod model_files;
pub mod nvml;
pub mod probe;
pub mod safetensors;
pub mod token_lengths;
pub mod trainer_environment;
