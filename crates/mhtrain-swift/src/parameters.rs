//! Which parameters does `swift sft` accept, and what is a misspelt one meant to be?

use std::collections::BTreeMap;
use std::sync::OnceLock;

/// What one value of a parameter has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// Any text, JSON included.
    Text,
    /// A whole number.
    Int,
    /// Any number.
    Float,
    /// `true` or `false`.
    Bool,
    /// One of these words.
    Choice(Vec<&'static str>),
}

/// One parameter of `swift sft`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name without dashes.
    pub name: &'static str,
    /// What one value has to be.
    pub kind: ParameterKind,
    /// Whether it takes several values.
    pub many: bool,
}

/// Every parameter of one line of ms-swift.
#[derive(Clone, Debug)]
pub struct Parameters {
    by_name: BTreeMap<&'static str, Parameter>,
}

impl Parameters {
    /// Returns the parameters of the 3.x line, as 3.12.6 has them.
    pub fn of_3() -> &'static Parameters {
        static TABLE: OnceLock<Parameters> = OnceLock::new();
        TABLE.get_or_init(|| Parameters::read(include_str!("parameters-3.x.txt")))
    }

    /// Returns the parameters of the 4.x line, as 4.6.0 has them.
    pub fn of_4() -> &'static Parameters {
        static TABLE: OnceLock<Parameters> = OnceLock::new();
        TABLE.get_or_init(|| Parameters::read(include_str!("parameters-4.x.txt")))
    }

    fn read(text: &'static str) -> Parameters {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let by_name =
            lines.filter_map(|line| line.split_once(' ')).map(|(name, kind)| (name, parameter(name, kind)));
        Parameters { by_name: by_name.collect() }
    }

    /// Returns the parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name)
    }

    /// Returns every parameter, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.by_name.values()
    }

    /// Returns the known name that `name` is most likely a misspelling of.
    ///
    /// The measure is `strsim`'s Damerau-Levenshtein distance; up to a quarter of the letters may be wrong.
    pub fn nearest(&self, name: &str) -> Option<&'static str> {
        let distance = |known: &str| strsim::damerau_levenshtein(name, known);
        let nearest = self.by_name.keys().copied().min_by_key(|known| distance(known))?;
        (distance(nearest) <= name.chars().count().div_ceil(4)).then_some(nearest)
    }

    /// Returns the only parameter whose name begins with `prefix`: argparse takes a unique beginning for the name.
    pub fn by_unique_prefix(&self, prefix: &str) -> Option<&'static str> {
        let mut names = self.by_name.keys().copied().filter(|name| name.starts_with(prefix));
        names.next().filter(|_| !prefix.is_empty() && names.next().is_none())
    }
}

fn parameter(name: &'static str, text: &'static str) -> Parameter {
    let (one, many) = text.strip_suffix('*').map_or((text, false), |one| (one, true));
    let kind = match one {
        "text" => ParameterKind::Text,
        "int" => ParameterKind::Int,
        "float" => ParameterKind::Float,
        "bool" => ParameterKind::Bool,
        words => ParameterKind::Choice(words.split('|').collect()),
    };
    Parameter { name, kind, many }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_read_whole() {
        // The counts are those of the two installed parsers.
        assert_eq!(Parameters::of_3().iter().count(), 337);
        assert_eq!(Parameters::of_4().iter().count(), 333);
    }

    #[test]
    fn the_tuner_flag_was_renamed_without_an_alias() {
        assert!(
            Parameters::of_3().get("train_type").is_some() && Parameters::of_3().get("tuner_type").is_none()
        );
        assert!(
            Parameters::of_4().get("tuner_type").is_some() && Parameters::of_4().get("train_type").is_none()
        );
    }

    #[test]
    fn types_are_known() {
        let get = |name| Parameters::of_4().get(name).unwrap();
        assert_eq!(get("learning_rate").kind, ParameterKind::Float);
        assert_eq!(get("packing").kind, ParameterKind::Bool);
        assert_eq!(get("swanlab_mode").kind, ParameterKind::Choice(vec!["cloud", "local"]));
        assert!(get("dataset").many && !get("model").many);
    }

    #[test]
    fn a_misspelling_names_its_neighbour() {
        assert_eq!(Parameters::of_4().nearest("lora_rnak"), Some("lora_rank"));
        assert_eq!(Parameters::of_4().nearest("qqqqqqqq"), None);
        assert_eq!(Parameters::of_4().nearest(""), None);
    }

    #[test]
    fn a_unique_beginning_is_a_name_and_a_shared_one_is_not() {
        let table = Parameters::of_4();
        assert_eq!(table.by_unique_prefix("per_device_train_batch"), Some("per_device_train_batch_size"));
        assert_eq!(table.by_unique_prefix("per_device"), None);
        assert_eq!(table.by_unique_prefix(""), None);
    }
}
