//! How many bytes of weights does a safetensors file hold?
//!
//! The format: 8 bytes with the length N of the header (little-endian), N bytes of JSON that map the name of a tensor
//! to its type, shape and place, then the data. Only the header is read.
//! Source: the format section of the safetensors README; the bound of 100 MB is `MAX_HEADER_SIZE` of its reader.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use mhtrain_sizing::units::Bytes;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Longest header that the format allows.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// What the headers of weight files say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Weights {
    /// Bytes of all tensors.
    pub bytes: Bytes,
    /// Elements of all tensors. For packed 4-bit formats that is not the number of parameters.
    pub elements: u64,
    /// Bytes by type as the format names it: `BF16`, `F32`, `U8`, …
    pub bytes_by_dtype: BTreeMap<String, Bytes>,
}

impl Weights {
    /// Returns the number of parameters; `None` where more than a hundredth of the bytes is of a type that packs several
    /// into one element, or may. Small tensors of such types are buffers: positions, masks.
    pub fn parameters(&self) -> Option<u64> {
        let mut parameters = 0u64;
        let mut others = Bytes::ZERO;
        for (dtype, bytes) in &self.bytes_by_dtype {
            match dtype.as_str() {
                "BF16" | "F16" => parameters = parameters.saturating_add(bytes.get() / 2),
                "F32" => parameters = parameters.saturating_add(bytes.get() / 4),
                "F64" => parameters = parameters.saturating_add(bytes.get() / 8),
                _ => others = others.saturating_add(*bytes),
            }
        }
        (others.get() <= self.bytes.get() / 100).then_some(parameters)
    }

    /// Adds another file's.
    pub fn add(&mut self, other: &Weights) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.elements = self.elements.saturating_add(other.elements);
        for (dtype, bytes) in &other.bytes_by_dtype {
            let sum = self.bytes_by_dtype.entry(dtype.clone()).or_default();
            *sum = sum.saturating_add(*bytes);
        }
    }
}

/// A weight file that cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The header is no header.
    #[error("{} is no safetensors file: {what}", path.display())]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file ends before its data does.
    #[error("{} is incomplete: its header needs {needed} bytes, the file has {found}", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Length by the header.
        needed: u64,
        /// Length of the file.
        found: u64,
    },
    /// A file that the index names is absent.
    #[error("{} is missing, which {} names", path.display(), index.display())]
    MissingShard {
        /// The absent file.
        path: PathBuf,
        /// The index.
        index: PathBuf,
    },
}

impl WeightsError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            WeightsError::Io { .. } => "check that the file exists and may be read".to_owned(),
            WeightsError::Corrupt { .. } | WeightsError::Truncated { .. } => {
                "download the file again: the copy is damaged or unfinished (a git-lfs pointer is no weight file)".to_owned()
            }
            WeightsError::MissingShard { .. } => "download the rest of the model".to_owned(),
        })
    }
}

/// Reads the header of one file.
///
/// # Errors
///
/// The file cannot be read, its header is malformed, or the file is shorter than its header says.
pub fn read_header(path: &Path) -> Result<Weights, WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let corrupt = |what: String| WeightsError::Corrupt { path: path.to_owned(), what };
    let mut file = File::open(path).map_err(io)?;
    let found = file.metadata().map_err(io)?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| corrupt(format!("it has only {found} bytes")))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(corrupt(format!(
            "its header would have {length} bytes, at most {HEADER_BYTES_MAX} are allowed"
        )));
    }
    let data_start = length + 8;
    if data_start > found {
        return Err(WeightsError::Truncated { path: path.to_owned(), needed: data_start, found });
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(io)?;
    let header: Header = serde_json::from_slice(&header).map_err(|error| corrupt(error.to_string()))?;
    let needed = data_start.saturating_add(header.data_end);
    match needed > found {
        true => Err(WeightsError::Truncated { path: path.to_owned(), needed, found }),
        false => Ok(header.weights),
    }
}

/// The JSON of a header, summed up while it is read: large models have thousands of tensors.
struct Header {
    weights: Weights,
    data_end: u64,
}

#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Header, D::Error> {
        from.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { weights: Weights::default(), data_end: 0 };
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let tensor: Tensor = map.next_value()?;
            let (begin, end) = tensor.data_offsets;
            let bytes = end.checked_sub(begin).ok_or_else(|| {
                serde::de::Error::custom(format!("tensor {name} ends at {end}, before its begin {begin}"))
            })?;
            let elements = tensor.shape.iter().fold(1u64, |product, size| product.saturating_mul(*size));
            let bytes_by_dtype = BTreeMap::from([(tensor.dtype, Bytes::new(bytes))]);
            header.weights.add(&Weights { bytes: Bytes::new(bytes), elements, bytes_by_dtype });
            header.data_end = header.data_end.max(end);
        }
        Ok(header)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes a file with this header and as many bytes of data.
    pub(crate) fn write_file(path: &Path, header: &str, data: usize) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        std::fs::write(path, bytes).unwrap();
    }

    const HEADER: &str = r#"{"__metadata__":{"format":"pt"},
        "a":{"dtype":"BF16","shape":[3,4],"data_offsets":[0,24]},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[24,32]}}"#;

    #[test]
    fn the_header_gives_exact_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        write_file(&path, HEADER, 32);
        let weights = read_header(&path).unwrap();
        assert_eq!((weights.bytes, weights.elements), (Bytes::new(32), 14));
        assert_eq!(weights.bytes_by_dtype["BF16"], Bytes::new(24));
        assert_eq!(weights.parameters(), Some(14));
    }

    #[test]
    fn types_that_pack_several_weights_say_nothing_about_their_number() {
        let of = |types: &[(&str, u64)]| {
            let bytes_by_dtype: BTreeMap<String, Bytes> =
                types.iter().map(|(dtype, bytes)| ((*dtype).to_owned(), Bytes::new(*bytes))).collect();
            Weights { bytes: bytes_by_dtype.values().copied().sum(), elements: 0, bytes_by_dtype }
                .parameters()
        };
        assert_eq!(of(&[("F64", 800), ("F32", 4000), ("F16", 20), ("BF16", 20)]), Some(1120));
        assert_eq!(of(&[("BF16", 10_000), ("I64", 96)]), Some(5000), "a buffer of positions");
        assert_eq!(of(&[("BF16", 10_000), ("U8", 10_000)]), None);
        assert_eq!(of(&[("BF16", 10_000), ("I32", 10_000)]), None);
        assert_eq!(of(&[("BF16", 10_000), ("F8_E4M3", 10_000)]), None);
    }

    #[test]
    fn a_short_file_is_incomplete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        write_file(&path, HEADER, 31);
        assert!(matches!(
            read_header(&path),
            Err(WeightsError::Truncated { needed, found, .. }) if needed == found + 1
        ));
    }

    #[test]
    fn damage_is_an_error_and_never_an_allocation() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let backwards = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}}"#;
        let cases: [(&[u8], &str); 5] = [
            (b"", "empty"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
            (&[0xff; 64], "a huge header"),
            (&[4, 0, 0, 0, 0, 0, 0, 0, b'[', b'1', b']', b' '], "a list"),
            (&[2, 0, 0, 0, 0, 0, 0, 0, b'{', 0xff], "bad JSON"),
        ];
        for (bytes, name) in cases {
            std::fs::write(&path, bytes).unwrap();
            assert!(matches!(read_header(&path), Err(WeightsError::Corrupt { .. })), "{name}");
        }
        write_file(&path, backwards, 8);
        assert!(matches!(read_header(&path), Err(WeightsError::Corrupt { .. })));
        write_file(
            &path,
            r#"{"a":{"dtype":"F32","shape":[18446744073709551615,9],"data_offsets":[0,18446744073709551615]}}"#,
            8,
        );
        assert!(matches!(read_header(&path), Err(WeightsError::Truncated { .. })), "no overflow");
        assert!(matches!(read_header(&directory.path().join("absent")), Err(WeightsError::Io { .. })));
    }
}
