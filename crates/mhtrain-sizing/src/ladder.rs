//! Which rungs are there, and what values do they carry?

/// Classes, profiles and advice, read from `config/tiers.toml`.
#[derive(Clone, Debug, PartialEq)]
pub struct TierBook {}

/// Why a tier book cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("tiers.toml: {message}")]
pub struct TierBookError {
    message: String,
}

impl TierBookError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        None
    }
}

impl TierBook {
    /// Reads a tier book.
    pub fn from_toml(_text: &str) -> Result<TierBook, TierBookError> {
        Ok(TierBook {})
    }

    /// Returns the book that comes with the program.
    pub fn builtin() -> TierBook {
        TierBook {}
    }

    /// Returns the steps between evaluations (recipe section 8.4).
    pub fn eval_steps(&self, _parameters: u64) -> u32 {
        200
    }

    /// Returns the data loader workers for a host of `cores` cores.
    pub fn dataloader_workers(&self, cores: u32) -> u32 {
        (cores / 2).clamp(1, 8)
    }
}
