//! What does one line of `mhtraind estimate --json` ask?

use serde_json::Value;

use crate::estimate::{EstimateError, estimate, Estimate};
use crate::model::{Model, ResolveError};
use crate::workload::Workload;

/// One line, parsed. The `config` path is for the caller to load: this crate reads no file.
#[derive(Clone, Debug, PartialEq)]
pub struct EstimateRequest {
    /// Where the model's shape is to be found.
    pub config: ConfigRef,
    /// The pass.
    pub workload: Workload,
}

/// Where the model's shape is to be found.
#[derive(Clone, Debug, PartialEq)]
pub enum ConfigRef {
    /// Path of a config.json.
    Path(String),
    /// The object itself.
    Object(Value),
}

/// Why a line cannot be answered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EstimateRequestError {
    /// It is no JSON.
    #[error("not a JSON object: {0}")]
    NotJson(String),
    /// The model has no usable shape.
    #[error(transparent)]
    Model(#[from] ResolveError),
    /// The workload cannot be estimated.
    #[error(transparent)]
    Estimate(#[from] EstimateError),
}

impl EstimateRequestError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        None
    }

    /// Returns a short name of the kind of error for the JSON interface.
    pub fn code(&self) -> &'static str {
        "bad_request"
    }
}

impl EstimateRequest {
    /// Reads one line.
    pub fn parse(line: &str) -> Result<EstimateRequest, EstimateRequestError> {
        Err(EstimateRequestError::NotJson(line.to_owned()))
    }

    /// Answers it; `loaded` is the content of the file that [`ConfigRef::Path`] names, `None` for an object.
    pub fn answer(&self, loaded: Option<&Value>) -> Result<Estimate, EstimateRequestError> {
        let (name, config) = match &self.config {
            ConfigRef::Path(path) => (path.as_str(), loaded),
            ConfigRef::Object(object) => ("config_object", Some(object)),
        };
        let model = Model::resolve(name, config, None)?;
        Ok(estimate(&model, &self.workload)?)
    }
}
