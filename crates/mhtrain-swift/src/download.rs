//! How is a model or a data set downloaded as ms-swift would do it?

/// A program for the trainer's interpreter, for `python -c`. Its one argument is a JSON object: `model`, `model_revision`,
/// `datasets` and `use_hf` as in `swift sft`; each may be null or missing. Exit code 0: everything is here.
pub const SOURCE: &str = include_str!("download.py");
