//! What is known about an installed trainer?

use std::collections::BTreeMap;
use std::path::PathBuf;

use mhtrain_sizing::request::TrainerFeatures;
use serde::{Deserialize, Serialize};

use crate::dialect::Dialect;

/// One Python environment that ms-swift runs in, read without importing torch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerEnvironment {
    /// Its interpreter.
    pub python: PathBuf,
    /// Version of the interpreter, for example `3.11.7`.
    pub python_version: String,
    /// ms-swift's own sft script; `None` where it cannot be found, and then the wrapper is started.
    pub sft_script: Option<PathBuf>,
    /// Installed versions by distribution name (`ms-swift`, `torch`, `transformers`, `peft`, `flash-attn`,
    /// `liger-kernel`, `bitsandbytes`, `deepspeed`, `swanlab`, …); what is absent is not installed.
    pub packages: BTreeMap<String, String>,
    /// Whether torch's files are compiled to bytecode: without it a start takes about three times as long.
    pub bytecode: bool,
}

impl TrainerEnvironment {
    /// Returns the installed version of a distribution.
    pub fn version(&self, distribution: &str) -> Option<&str> {
        self.packages.get(distribution).map(String::as_str)
    }

    /// Returns what sizing wants to know.
    pub fn features(&self) -> TrainerFeatures {
        TrainerFeatures {
            flash_attn: self.version("flash-attn").is_some(),
            liger: self.version("liger-kernel").is_some(),
            bitsandbytes: self.version("bitsandbytes").is_some(),
            experts: Dialect::for_environment(self).0.experts(),
        }
    }
}
