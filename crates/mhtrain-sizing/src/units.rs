//! How are amounts of memory written down?

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An amount of memory in bytes. JSON shows it as a plain integer.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(u64);

impl Bytes {
    /// No bytes at all.
    pub const ZERO: Bytes = Bytes(0);

    /// Returns `bytes` as an amount.
    pub const fn new(bytes: u64) -> Bytes {
        Bytes(bytes)
    }

    /// Returns `mib` mebibytes (2^20 bytes each); saturates at the largest amount.
    pub const fn from_mib(mib: u64) -> Bytes {
        Bytes(mib.saturating_mul(1 << 20))
    }

    /// Returns `gib` gibibytes (2^30 bytes each); saturates at the largest amount.
    pub const fn from_gib(gib: u64) -> Bytes {
        Bytes(gib.saturating_mul(1 << 30))
    }

    /// Returns `bytes` rounded to whole bytes: a negative amount or NaN is zero, too large an amount the largest.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "`as` saturates, which is what is promised"
    )]
    pub fn from_f64(bytes: f64) -> Bytes {
        Bytes(bytes.round() as u64)
    }

    /// Returns the number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the number of bytes for arithmetic with ratios; exact below 2^53 bytes (8 PiB).
    #[expect(clippy::cast_precision_loss, reason = "no device has 2^53 bytes")]
    pub fn as_f64(self) -> f64 {
        self.0 as f64
    }

    /// Returns the amount in gibibytes.
    pub fn gib(self) -> f64 {
        self.as_f64() / f64::from(1 << 30)
    }

    /// Returns the amount in mebibytes.
    pub fn mib(self) -> f64 {
        self.as_f64() / f64::from(1 << 20)
    }

    /// Returns `self - other`, or `None` below zero.
    pub fn checked_sub(self, other: Bytes) -> Option<Bytes> {
        self.0.checked_sub(other.0).map(Bytes)
    }

    /// Returns `self - other`, or zero below zero.
    pub fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// Returns `self + other`; saturates at the largest amount.
    pub fn saturating_add(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }
}

/// Fewest bytes that a number without a unit is taken for: no CUDA card has less than a MiB, and none has 2^20 GiB.
const CARD_MIN: Bytes = Bytes::from_mib(1);

/// Reads the memory of a card as [`Bytes::from_str`] does, and refuses the number that a forgotten unit leaves.
///
/// # Errors
/// No amount of memory, or a number of bytes that no card has.
pub fn card_memory(text: &str) -> Result<Bytes, ParseBytesError> {
    let memory: Bytes = text.parse()?;
    let bare = text.trim().bytes().all(|byte| byte.is_ascii_digit());
    if bare && memory > Bytes::ZERO && memory < CARD_MIN {
        let as_gib = Bytes::from_gib(memory.get()).get();
        return Err(ParseBytesError::NoCard { text: text.trim().to_owned(), as_gib });
    }
    Ok(memory)
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(amounts: I) -> Bytes {
        amounts.fold(Bytes::ZERO, Bytes::saturating_add)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            b if b >= 1 << 30 => format!("{:.2} GiB", self.gib()),
            b if b >= 1 << 20 => format!("{:.0} MiB", self.mib()),
            b if b >= 1 << 10 => format!("{:.0} KiB", self.as_f64() / 1024.0),
            b => format!("{b} bytes"),
        };
        f.pad(&text)
    }
}

/// Text that is no amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseBytesError {
    /// It is no number with a known unit.
    #[error(
        "`{text}` is no amount of memory (write for example 22.5GiB, 24564MiB, 80GB or a number of bytes)"
    )]
    NoAmount {
        /// The text.
        text: String,
    },
    /// A part of a byte: the unit was forgotten.
    #[error(
        "`{text}` has no unit, and there is no part of a byte: write {text}GiB, or a whole number of bytes"
    )]
    NoUnit {
        /// The text.
        text: String,
    },
    /// So few bytes without a unit that they cannot be the memory of a card.
    #[error("`{text}` has no unit, and {text} bytes are no card: write {text}GiB, or all bytes ({as_gib})")]
    NoCard {
        /// The text.
        text: String,
        /// The number of bytes that as many GiB are.
        as_gib: u64,
    },
}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    /// Reads `22.5GiB`, `24564 MiB`, `80GB` (decimal), `512K` (binary, as nvidia-smi and torch mean it) or bytes.
    fn from_str(text: &str) -> Result<Bytes, ParseBytesError> {
        let fail = || ParseBytesError::NoAmount { text: text.to_owned() };
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let number: f64 = number.parse().map_err(|_| fail())?;
        if unit.is_empty() && number.fract() != 0.0 {
            return Err(ParseBytesError::NoUnit { text: trimmed.to_owned() });
        }
        let scale = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" | "bytes" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            _ => return Err(fail()),
        };
        let bytes = number * scale;
        if !bytes.is_finite() || bytes > 2f64.powi(60) {
            return Err(fail());
        }
        Ok(Bytes::from_f64(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_in_binary_and_decimal_units() {
        assert_eq!("22.5GiB".parse(), Ok(Bytes::new(24_159_191_040)));
        assert_eq!("24564 MiB".parse(), Ok(Bytes::from_mib(24_564)));
        assert_eq!("80GB".parse(), Ok(Bytes::new(80_000_000_000)));
        assert_eq!("123".parse(), Ok(Bytes::new(123)));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "GiB", "-1GiB", "1.2.3GiB", "5 parsecs", "1e400", "NaN", "9999999999TiB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_forgotten_unit_is_an_error_that_suggests_both_forms() {
        let error = "22.5".parse::<Bytes>().unwrap_err().to_string();
        assert_eq!(
            error,
            "`22.5` has no unit, and there is no part of a byte: write 22.5GiB, or a whole number of bytes"
        );
        let error = card_memory("24").unwrap_err().to_string();
        assert_eq!(
            error,
            "`24` has no unit, and 24 bytes are no card: write 24GiB, or all bytes (25769803776)"
        );
        assert!(card_memory("24564").is_err());
        assert_eq!(card_memory("25769803776"), Ok(Bytes::from_gib(24)));
        assert_eq!(card_memory("0"), Ok(Bytes::ZERO));
        assert_eq!(card_memory("24 MiB"), Ok(Bytes::from_mib(24)));
    }

    #[test]
    fn display_picks_a_readable_unit() {
        assert_eq!(Bytes::from_mib(24_564).to_string(), "23.99 GiB");
        assert_eq!(Bytes::from_mib(512).to_string(), "512 MiB");
        assert_eq!(Bytes::new(12).to_string(), "12 bytes");
    }
}
