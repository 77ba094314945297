//! How does the installed ms-swift spell things, and which of its habits must be allowed for?
//!
//! The dialect follows from the versions of *two* packages: ms-swift decides names, transformers decides what a
//! resumed run takes from its checkpoint.

use std::fmt;

use mhtrain_sizing::workload::{AttnImpl, ExpertForm};

use crate::environment::TrainerEnvironment;
use crate::parameters::Parameters;

/// The lines of ms-swift that are known.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Line {
    /// 3.x, known from 3.12.6.
    V3,
    /// 4.x, known from 4.6.0.
    V4,
}

impl Line {
    /// The version whose parameters and habits are listed for this line.
    pub fn listed_version(self) -> &'static str {
        match self {
            Line::V3 => "3.12.6",
            Line::V4 => "4.6.0",
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Line::V3 => "3.x",
            Line::V4 => "4.x",
        })
    }
}

/// The names and habits of one installed pair of ms-swift and transformers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialect {
    line: Line,
    ms_swift: Option<Version>,
    transformers: Option<Version>,
}

/// Names that one line has and the other spells differently, 3.x first.
///
/// Source: the two lists of parameters; for `train_type` and `metric` also the fact that neither line takes the
/// other's name.
const RENAMED: [(&str, &str); 4] = [
    ("train_type", "tuner_type"),
    ("metric", "eval_metric"),
    ("no_cuda", "use_cpu"),
    ("save_safetensors", "safe_serialization"),
];

impl Dialect {
    /// Returns the dialect of the installed versions, and a sentence for each guess that it rests on.
    pub fn for_versions(ms_swift: Option<&str>, transformers: Option<&str>) -> (Dialect, Vec<String>) {
        let mut warnings = Vec::new();
        let line = line_of(ms_swift, &mut warnings);
        if let Some(text) = transformers.filter(|text| Version::parse(text).is_none()) {
            warnings
                .push(format!("transformers' version `{text}` cannot be read; its 4.x habits are assumed"));
        } else if transformers.is_none() && ms_swift.is_some() {
            warnings.push("transformers' version is not known; its 4.x habits are assumed".to_owned());
        }
        let dialect = Dialect {
            line,
            ms_swift: ms_swift.and_then(Version::parse),
            transformers: transformers.and_then(Version::parse),
        };
        (dialect, warnings)
    }

    /// Returns the dialect of a trainer environment, and a sentence for each guess that it rests on.
    pub fn for_environment(environment: &TrainerEnvironment) -> (Dialect, Vec<String>) {
        Dialect::for_versions(environment.version("ms-swift"), environment.version("transformers"))
    }

    /// Returns the line of ms-swift whose names are used.
    pub fn line(&self) -> Line {
        self.line
    }

    /// Returns how the installed transformers holds the experts of a mixture: a module each up to 4.57, one parameter for
    /// all in 5.x. Where its version is not known, ms-swift 3.x takes 4.x alone and 4.x comes with 5.x.
    ///
    /// Source: `*SparseMoeBlock` in `modeling_*.py` of transformers 4.57 and 5.19.
    pub fn experts(&self) -> ExpertForm {
        match (&self.transformers, self.line) {
            (Some(version), _) if version.major < 5 => ExpertForm::Modules,
            (None, Line::V3) => ExpertForm::Modules,
            (Some(_), _) | (None, Line::V4) => ExpertForm::Fused,
        }
    }

    /// Returns whether the installed version is the very one whose parameters are listed, so that a name that is
    /// not in the list is certainly refused by the trainer.
    pub fn is_listed_version(&self) -> bool {
        self.ms_swift
            .as_ref()
            .is_some_and(|version| Version::parse(self.line.listed_version()).as_ref() == Some(version))
    }

    /// Returns the parameters that this line accepts.
    pub fn parameters(&self) -> &'static Parameters {
        match self.line {
            Line::V3 => Parameters::of_3(),
            Line::V4 => Parameters::of_4(),
        }
    }

    /// Returns the parameters of the other line.
    pub fn other_parameters(&self) -> &'static Parameters {
        match self.line {
            Line::V3 => Parameters::of_4(),
            Line::V4 => Parameters::of_3(),
        }
    }

    /// Returns the name of the parameter that says what is trained: 4.x renamed it, without an alias.
    pub fn tuner_flag(&self) -> &'static str {
        match self.line {
            Line::V3 => "train_type",
            Line::V4 => "tuner_type",
        }
    }

    /// Returns the name of the parameter that chooses the metric of an evaluation.
    pub fn metric_flag(&self) -> &'static str {
        match self.line {
            Line::V3 => "metric",
            Line::V4 => "eval_metric",
        }
    }

    /// Returns this line's name for a parameter that the other line calls `name`.
    pub fn renamed(&self, name: &str) -> Option<&'static str> {
        RENAMED.iter().find_map(|(three, four)| match self.line {
            Line::V3 => (*four == name && self.parameters().get(name).is_none()).then_some(*three),
            Line::V4 => (*three == name && self.parameters().get(name).is_none()).then_some(*four),
        })
    }

    /// Returns whether a resumed run takes its micro-batch from the checkpoint and not from the command line.
    ///
    /// transformers 4.57 does (0 steps were trained, exit code 0), 5.19 does not. Where between them it changed
    /// is not known, so everything below 5 and everything unknown counts as restoring: the repaired checkpoint
    /// that follows from it is harmless on 5.
    pub fn restores_checkpoint_batch(&self) -> bool {
        self.transformers.as_ref().is_none_or(|version| version.major < 5)
    }

    /// Returns whether a run that resumes inside its second or a later epoch trains the first epoch's order again.
    ///
    /// Every ms-swift before 4.6.0 does on transformers 4; with transformers 5 the epoch is set after the skip.
    pub fn replays_first_epoch(&self) -> bool {
        let repaired =
            self.line == Line::V4 && self.ms_swift.as_ref().is_none_or(|version| !version.is_before(4, 6, 0));
        !repaired && self.restores_checkpoint_batch()
    }

    /// Returns the values that `--swanlab_mode` takes; any other ends the trainer with status 2.
    pub fn swanlab_modes(&self) -> &'static [&'static str] {
        &["cloud", "local"]
    }

    /// Returns the attention implementations that packing and padding_free are accepted with.
    ///
    /// Source: the error text of the argument check in 3.12.6 and 4.6.0.
    pub fn packing_attn_impls(&self) -> &'static [AttnImpl] {
        const FLASH: [AttnImpl; 4] = [
            AttnImpl::FlashAttn,
            AttnImpl::FlashAttention2,
            AttnImpl::FlashAttention3,
            AttnImpl::FlashAttention4,
        ];
        match self.line {
            Line::V3 => &FLASH[..3],
            Line::V4 => &FLASH,
        }
    }

    /// Returns whether SIGTERM can be made to save a checkpoint (`--enable_jit_checkpoint`).
    pub fn has_jit_checkpoint(&self) -> bool {
        self.line == Line::V4 && self.transformers.as_ref().is_some_and(|version| version.major >= 5)
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.ms_swift {
            Some(version) => write!(f, "ms-swift {}", version.text),
            None => write!(f, "ms-swift {}", self.line),
        }
    }
}

/// Returns the line that speaks for an installed version, and adds a sentence where that is a guess.
fn line_of(ms_swift: Option<&str>, warnings: &mut Vec<String>) -> Line {
    let Some(text) = ms_swift else {
        warnings.push("no ms-swift is installed; the names of 4.6.0 are used".to_owned());
        return Line::V4;
    };
    let (line, reason) = match Version::parse(text) {
        None => (Line::V4, Some("cannot be read")),
        Some(version) if version.major < 3 => (Line::V3, Some("is older than the lines that are known")),
        Some(version) if version.major > 4 => (Line::V4, Some("is newer than the lines that are known")),
        Some(version) if version.is_development => {
            (if version.major == 3 { Line::V3 } else { Line::V4 }, Some("is a development version"))
        }
        Some(version) if version.major == 3 => (Line::V3, None),
        Some(_) => (Line::V4, None),
    };
    if let Some(reason) = reason {
        let nearest = line.listed_version();
        warnings.push(format!("ms-swift's version `{text}` {reason}; the names of {nearest} are used"));
    }
    line
}

/// A Python package's version, as far as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    major: u32,
    minor: u32,
    patch: u32,
    is_development: bool,
    text: String,
}

impl Version {
    /// Reads `4.6.0`, `4.6`, `4.6.0.dev0`, `4.0.0-dev`, `3.12.6.post1`, `4.6.0+cu121`; `None` for anything else.
    fn parse(text: &str) -> Option<Version> {
        let text = text.trim();
        let release_end = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
        let (release, rest) = text.split_at(release_end);
        let mut numbers = release.trim_end_matches('.').split('.').map(|part| part.parse::<u32>().ok());
        let major = numbers.next()??;
        let mut next = || numbers.next().map_or(Some(0), |number| number);
        let (minor, patch) = (next()?, next()?);
        let is_development = ["dev", "rc", "a", "b"]
            .iter()
            .any(|mark| rest.trim_start_matches(['.', '-', '_']).starts_with(mark));
        Some(Version { major, minor, patch, is_development, text: text.to_owned() })
    }

    /// Returns whether this is older than a release; its own development versions are.
    fn is_before(&self, major: u32, minor: u32, patch: u32) -> bool {
        let this = (self.major, self.minor, self.patch);
        this < (major, minor, patch) || (this == (major, minor, patch) && self.is_development)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dialect(ms_swift: &str, transformers: &str) -> Dialect {
        Dialect::for_versions(Some(ms_swift), Some(transformers)).0
    }

    #[test]
    fn experts_are_modules_with_transformers_4() {
        assert_eq!(dialect("3.12.6", "4.57.6").experts(), ExpertForm::Modules);
        assert_eq!(dialect("4.6.0", "4.57.6").experts(), ExpertForm::Modules);
        assert_eq!(dialect("4.6.0", "5.19.0").experts(), ExpertForm::Fused);
        let of = |ms_swift| Dialect::for_versions(ms_swift, None).0.experts();
        assert_eq!(of(Some("3.12.6")), ExpertForm::Modules);
        assert_eq!((of(Some("4.6.0")), of(None)), (ExpertForm::Fused, ExpertForm::Fused));
    }

    #[test]
    fn the_installed_version_decides_the_names() {
        let three = dialect("3.12.6", "4.57.6");
        let four = dialect("4.6.0", "5.19.0");
        assert_eq!((three.tuner_flag(), three.metric_flag()), ("train_type", "metric"));
        assert_eq!((four.tuner_flag(), four.metric_flag()), ("tuner_type", "eval_metric"));
        assert!(three.is_listed_version() && four.is_listed_version());
        assert!(!dialect("4.5.2", "4.57.6").is_listed_version());
    }

    #[test]
    fn known_lines_give_no_warning_and_others_give_one() {
        for known in ["3.0.0", "3.12.6", "4.0.0", "4.6.0", "4.99.1", "3.12.6.post1"] {
            assert_eq!(Dialect::for_versions(Some(known), Some("4.57.6")).1, Vec::<String>::new(), "{known}");
        }
        let cases = [("2.6.1", Line::V3), ("5.0.0", Line::V4), ("4.0.0-dev", Line::V4), ("main", Line::V4)];
        for (text, line) in cases {
            let (dialect, warnings) = Dialect::for_versions(Some(text), Some("4.57.6"));
            assert_eq!(dialect.line(), line, "{text}");
            assert_eq!(warnings.len(), 1, "{text}: {warnings:?}");
            assert!(warnings[0].contains(text) && warnings[0].contains(line.listed_version()));
        }
    }

    #[test]
    fn nothing_installed_speaks_4_6_0_and_says_so() {
        let (dialect, warnings) = Dialect::for_versions(None, None);
        assert_eq!(dialect.line(), Line::V4);
        assert_eq!(warnings.len(), 1);
        assert!(!dialect.is_listed_version());
    }

    #[test]
    fn transformers_decides_whose_micro_batch_a_resumed_run_takes() {
        assert!(dialect("3.12.6", "4.57.6").restores_checkpoint_batch());
        assert!(dialect("4.6.0", "4.57.6").restores_checkpoint_batch());
        assert!(!dialect("4.6.0", "5.19.0").restores_checkpoint_batch());
        assert!(Dialect::for_versions(Some("4.6.0"), None).0.restores_checkpoint_batch());
        assert!(dialect("4.6.0", "nonsense").restores_checkpoint_batch());
    }

    #[test]
    fn epochs_are_replayed_before_4_6_0_on_transformers_4_only() {
        assert!(dialect("3.12.6", "4.57.6").replays_first_epoch());
        assert!(dialect("4.5.2", "4.57.6").replays_first_epoch());
        assert!(dialect("4.6.0.dev0", "4.57.6").replays_first_epoch());
        assert!(!dialect("4.6.0", "4.57.6").replays_first_epoch());
        assert!(!dialect("4.5.2", "5.1.0").replays_first_epoch());
    }

    #[test]
    fn names_are_translated_in_both_directions() {
        assert_eq!(dialect("4.6.0", "5.19.0").renamed("train_type"), Some("tuner_type"));
        assert_eq!(dialect("3.12.6", "4.57.6").renamed("tuner_type"), Some("train_type"));
        assert_eq!(dialect("3.12.6", "4.57.6").renamed("eval_metric"), Some("metric"));
        assert_eq!(dialect("4.6.0", "5.19.0").renamed("model"), None);
        assert_eq!(dialect("3.12.6", "4.57.6").renamed("use_cpu"), None, "3.x has it as well");
    }

    #[test]
    fn flash_attention_4_packs_on_4_x_only() {
        assert!(dialect("4.6.0", "5.19.0").packing_attn_impls().contains(&AttnImpl::FlashAttention4));
        assert!(!dialect("3.12.6", "4.57.6").packing_attn_impls().contains(&AttnImpl::FlashAttention4));
    }
}
