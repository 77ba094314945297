//! Is this model, or this data set, on this machine, and what do its files say?
//!
//! ms-swift takes a path that does not exist for a hub id and asks the network for up to a minute. So what looks like
//! a path and is not there is an error here, before anything starts.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use mhtrain_sizing::model::WeightFiles;
use mhtrain_sizing::units::Bytes;
use serde::Serialize;
use serde_json::Value;

use crate::safetensors::{self, Weights, WeightsError};

/// Longest config.json or weight index that is read; real ones are far below 1 MiB and 20 MiB.
const JSON_BYTES_MAX: u64 = 64 << 20;

/// Where files are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Directory that relative paths are relative to.
    pub working_dir: PathBuf,
    /// Home directory, for `~`.
    pub home: Option<PathBuf>,
    /// Directory of the Hugging Face cache: it has `models--org--name` in it.
    pub hugging_face: Option<PathBuf>,
    /// Root of the ModelScope cache: it has `models` or `hub` in it.
    pub modelscope: Option<PathBuf>,
    /// Whether the trainer asks Hugging Face first (`USE_HF`); ms-swift's own default is ModelScope.
    pub use_hugging_face: bool,
}

impl Places {
    /// Returns the places that a trainer with these variables uses. `variable` looks a variable up.
    ///
    /// Source: `huggingface_hub/constants.py` (HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME, XDG_CACHE_HOME),
    /// `modelscope/hub/utils/utils.py` (MODELSCOPE_CACHE, else ~/.cache/modelscope), `swift/hub` (USE_HF).
    pub fn from_variables(working_dir: &Path, variable: impl Fn(&str) -> Option<OsString>) -> Places {
        let home = variable("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let directory = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty()).map(PathBuf::from)?;
            Some(expand_home(&value, home.as_deref()))
        };
        let caches = home.as_ref().map(|home| home.join(".cache"));
        let hugging_face_home = directory("HF_HOME").or_else(|| {
            directory("XDG_CACHE_HOME").or(caches.clone()).map(|cache| cache.join("huggingface"))
        });
        let hugging_face = directory("HF_HUB_CACHE")
            .or_else(|| directory("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| hugging_face_home.map(|home| home.join("hub")));
        let modelscope =
            directory("MODELSCOPE_CACHE").or_else(|| caches.map(|cache| cache.join("modelscope")));
        let use_hf = variable("USE_HF").and_then(|value| value.into_string().ok()).unwrap_or_default();
        Places {
            working_dir: working_dir.to_owned(),
            hugging_face,
            modelscope,
            use_hugging_face: matches!(use_hf.to_ascii_lowercase().as_str(), "1" | "true"),
            home,
        }
    }

    fn resolve(&self, text: &str) -> PathBuf {
        self.working_dir.join(expand_home(Path::new(text), self.home.as_deref()))
    }
}

fn expand_home(path: &Path, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

/// A model as it was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum FoundModel {
    /// Its files are here.
    Here(ModelFiles),
    /// It is an id of a hub, and no cache has it: the trainer will download it.
    NotLocal {
        /// The id.
        id: String,
    },
}

/// Files of a model on this machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelFiles {
    /// The directory.
    pub directory: PathBuf,
    /// What the directory is.
    pub origin: Origin,
    /// What config.json says.
    pub config: Value,
    /// The weights; `None` when no weight file is there.
    pub weights: Option<LocalWeights>,
}

impl ModelFiles {
    /// Returns what sizing wants to know about the weights; `None` when no weight file is there.
    ///
    /// Older files say nothing about their types: they have the one of config.json, where it states one.
    pub fn weight_files(&self) -> Option<WeightFiles> {
        let weights = self.weights.as_ref()?;
        let bytes = weights.bytes();
        let parameters = match weights {
            LocalWeights::Safetensors(weights) => weights.parameters(),
            LocalWeights::FileSizes { .. } => {
                let stated = ["torch_dtype", "dtype"].iter().find_map(|key| self.config.get(*key)?.as_str());
                let width = match stated {
                    Some("bfloat16" | "float16") => Some(2),
                    Some("float32") => Some(4),
                    Some(_) | None => None,
                };
                width.map(|width| bytes.get() / width)
            }
        };
        Some(WeightFiles { bytes, parameters })
    }
}

/// What a directory of model files is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The user named it.
    Directory,
    /// A snapshot in the Hugging Face cache.
    HuggingFaceCache,
    /// A copy in the ModelScope cache.
    ModelScopeCache,
}

/// Weight files of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum LocalWeights {
    /// Their headers were read: exact.
    Safetensors(Weights),
    /// Older files without a header that can be read: their sizes, a little above the weights.
    FileSizes {
        /// Sum of the sizes.
        bytes: Bytes,
    },
}

impl LocalWeights {
    /// Returns the bytes of the weights.
    pub fn bytes(&self) -> Bytes {
        match self {
            LocalWeights::Safetensors(weights) => weights.bytes,
            LocalWeights::FileSizes { bytes } => *bytes,
        }
    }
}

/// A model that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// It looks like a path, and nothing is there.
    #[error("the model {} does not exist", path.display())]
    MissingModel {
        /// The whole path.
        path: PathBuf,
    },
    /// It is no directory.
    #[error("the model {} is not a directory", path.display())]
    NotADirectory {
        /// The whole path.
        path: PathBuf,
    },
    /// The directory is no model.
    #[error("the model directory {} has no config.json", path.display())]
    NoConfig {
        /// The directory.
        path: PathBuf,
    },
    /// config.json, or the index of the weights, cannot be read.
    #[error("cannot read {}: {what}", path.display())]
    BadJson {
        /// Which file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// A weight file is damaged.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Neither a path nor an id.
    #[error("`{text}` is neither a directory nor a hub id of the form `org/name`")]
    NoModel {
        /// What was written.
        text: String,
    },
}

impl ModelError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            ModelError::MissingModel { .. } | ModelError::NoModel { .. } => Some(
                "name a directory that exists, or a hub id such as `Qwen/Qwen2.5-7B-Instruct`".to_owned(),
            ),
            ModelError::NotADirectory { .. } => Some("name the directory that holds config.json".to_owned()),
            ModelError::NoConfig { .. } => {
                Some("name the directory that holds config.json; an adapter alone is no model".to_owned())
            }
            ModelError::BadJson { .. } => Some("download the file again: the copy is damaged".to_owned()),
            ModelError::Weights(error) => error.help(),
        }
    }
}

/// Returns the files of `model`: a directory, or a hub id that a cache may have.
///
/// # Errors
///
/// It looks like a path and is not there, or its files are damaged. A hub id that is nowhere is no error.
pub fn find_model(model: &str, places: &Places) -> Result<FoundModel, ModelError> {
    if model.is_empty() {
        return Err(ModelError::NoModel { text: model.to_owned() });
    }
    let path = places.resolve(model);
    if path.is_dir() {
        return read_model(path, Origin::Directory).map(FoundModel::Here);
    }
    if path.exists() {
        return Err(ModelError::NotADirectory { path });
    }
    if looks_like_path(model) {
        return Err(ModelError::MissingModel { path });
    }
    let Some(id) = HubId::parse(model) else {
        return Err(ModelError::NoModel { text: model.to_owned() });
    };
    match find_in_caches(&id, places) {
        Some((directory, origin)) => read_model(directory, origin).map(FoundModel::Here),
        None => Ok(FoundModel::NotLocal { id: model.to_owned() }),
    }
}

/// Whether a text can only be meant as a path: a hub id has one slash at most and begins with none of these.
fn looks_like_path(text: &str) -> bool {
    ["/", "./", "../", "~"].iter().any(|start| text.starts_with(start))
        || text == "."
        || text == ".."
        || text.ends_with('/')
        || text.matches('/').count() > 1
}

/// `org/name`.
struct HubId<'a> {
    organisation: &'a str,
    name: &'a str,
}

impl<'a> HubId<'a> {
    fn parse(text: &'a str) -> Option<HubId<'a>> {
        let (organisation, name) = text.split_once('/')?;
        let valid = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        (valid(organisation) && valid(name)).then_some(HubId { organisation, name })
    }
}

fn find_in_caches(id: &HubId<'_>, places: &Places) -> Option<(PathBuf, Origin)> {
    let hugging_face = || {
        let directory = hugging_face_snapshot(id, places.hugging_face.as_deref()?)?;
        Some((directory, Origin::HuggingFaceCache))
    };
    let modelscope = || {
        let directory = modelscope_copy(id, places.modelscope.as_deref()?)?;
        Some((directory, Origin::ModelScopeCache))
    };
    match places.use_hugging_face {
        true => hugging_face().or_else(modelscope),
        false => modelscope().or_else(hugging_face),
    }
}

/// Returns the snapshot that `refs/main` names; without that file, the only one that there is.
///
/// Source: the cache layout of huggingface_hub, "Understand caching".
fn hugging_face_snapshot(id: &HubId<'_>, cache: &Path) -> Option<PathBuf> {
    let repository = cache.join(format!("models--{}--{}", id.organisation, id.name));
    let snapshots = repository.join("snapshots");
    if let Ok(commit) = std::fs::read_to_string(repository.join("refs/main")) {
        return named_snapshot(&snapshots, &commit).filter(|directory| has_config(directory));
    }
    only_snapshot(&snapshots)
}

/// Returns the snapshot of a commit; `None` where what stands for one leads elsewhere.
fn named_snapshot(snapshots: &Path, commit: &str) -> Option<PathBuf> {
    let commit = commit.trim();
    let is_one_name =
        matches!(Path::new(commit).components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
    is_one_name.then(|| snapshots.join(commit))
}

fn only_snapshot(snapshots: &Path) -> Option<PathBuf> {
    let mut found = std::fs::read_dir(snapshots)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| has_config(path));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

/// Returns the copy of a model in the ModelScope cache. A dot in a name is written `___` there by older releases.
///
/// Source: `modelscope_hub/_download.py` (the present layout and the two before it), `modelscope/hub/utils/utils.py`
/// (older ones).
fn modelscope_copy(id: &HubId<'_>, cache: &Path) -> Option<PathBuf> {
    let HubId { organisation, name } = id;
    let snapshots = cache.join("models").join(format!("{organisation}--{name}")).join("snapshots");
    let current = snapshots.join("master");
    if has_config(&current) {
        return Some(current);
    }
    if let Some(only) = only_snapshot(&snapshots) {
        return Some(only);
    }
    let escaped = name.replace('.', "___");
    let roots = ["models", "hub/models", "", "hub"];
    let copies = roots.iter().flat_map(|root| {
        let organisation = cache.join(root).join(organisation);
        [organisation.join(&escaped), organisation.join(name)]
    });
    copies.into_iter().find(|directory| has_config(directory))
}

fn has_config(directory: &Path) -> bool {
    directory.join("config.json").is_file()
}

fn read_model(directory: PathBuf, origin: Origin) -> Result<ModelFiles, ModelError> {
    let path = directory.join("config.json");
    if !path.is_file() {
        return Err(ModelError::NoConfig { path: directory });
    }
    let config = read_json(&path)?;
    if !config.is_object() {
        return Err(ModelError::BadJson { path, what: "it is no JSON object".to_owned() });
    }
    let weights = read_weights(&directory)?;
    Ok(ModelFiles { directory, origin, config, weights })
}

fn read_json(path: &Path) -> Result<Value, ModelError> {
    let bad = |what: String| ModelError::BadJson { path: path.to_owned(), what };
    let length = path.metadata().map_err(|error| bad(error.to_string()))?.len();
    if length > JSON_BYTES_MAX {
        return Err(bad(format!("it has {length} bytes, at most {JSON_BYTES_MAX} are read")));
    }
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))
}

/// Returns the weights of a model directory, as transformers would choose its files: the index, else
/// `model.safetensors`, else any other safetensors, else the older `.bin`.
///
/// `consolidated*` is the same model once more in another layout (Mistral), and an adapter is no part of the model.
fn read_weights(directory: &Path) -> Result<Option<LocalWeights>, ModelError> {
    let index = directory.join("model.safetensors.index.json");
    if index.is_file() {
        return sum_headers(shards(directory, &index)?).map(Some);
    }
    let whole = directory.join("model.safetensors");
    if whole.exists() {
        return sum_headers(vec![whole]).map(Some);
    }
    let safetensors = files_ending(directory, ".safetensors");
    if !safetensors.is_empty() {
        return sum_headers(safetensors).map(Some);
    }
    let older: Vec<PathBuf> = files_ending(directory, ".bin")
        .into_iter()
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pytorch_model"))
        })
        .collect();
    let sizes = older.iter().filter_map(|path| path.metadata().ok()).map(|found| Bytes::new(found.len()));
    Ok((!older.is_empty()).then(|| LocalWeights::FileSizes { bytes: sizes.sum() }))
}

fn sum_headers(files: Vec<PathBuf>) -> Result<LocalWeights, ModelError> {
    let mut weights = Weights::default();
    for file in files {
        weights.add(&safetensors::read_header(&file)?);
    }
    Ok(LocalWeights::Safetensors(weights))
}

/// Returns the files that an index names. A name that leads out of the directory is an error, not a path to read.
fn shards(directory: &Path, index: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let bad = |what: &str| ModelError::BadJson { path: index.to_owned(), what: what.to_owned() };
    let json = read_json(index)?;
    let map =
        json.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("it has no `weight_map`"))?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    let names = names.ok_or_else(|| bad("a value of `weight_map` is no file name"))?;
    names
        .into_iter()
        .map(|name| {
            let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
            let path = directory.join(name);
            match (inside, path.exists()) {
                (false, _) => Err(bad("it names a file outside of the model")),
                (true, false) => Err(WeightsError::MissingShard { path, index: index.to_owned() }.into()),
                (true, true) => Ok(path),
            }
        })
        .collect()
}

fn files_ending(directory: &Path, end: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let wanted = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(end) && !name.starts_with("consolidated") && !name.starts_with("adapter")
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(wanted).collect();
    files.sort();
    files
}

/// Where a data set is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum FoundDataset {
    /// A file or directory of this machine.
    Here {
        /// The whole path.
        path: PathBuf,
        /// How many rows are taken; `None`: all.
        rows: Option<u64>,
    },
    /// An id of a hub: the trainer will download it, or has it in its cache.
    Hub {
        /// The id without prefix and row count.
        id: String,
        /// How many rows are taken; `None`: all.
        rows: Option<u64>,
    },
}

/// A data set that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatasetError {
    /// It looks like a path, and nothing is there.
    #[error("the data set {} does not exist", path.display())]
    MissingDataset {
        /// The whole path.
        path: PathBuf,
    },
    /// What follows `#` is no number of rows.
    #[error("`{rows}` in the data set `{text}` is no number of rows")]
    BadRows {
        /// The whole entry.
        text: String,
        /// What follows `#`.
        rows: String,
    },
    /// Neither a path nor an id.
    #[error("`{text}` is neither a file nor a hub id of the form `org/name`")]
    NoDataset {
        /// What was written.
        text: String,
    },
}

impl DatasetError {
    /// Returns what to do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            DatasetError::MissingDataset { .. } | DatasetError::NoDataset { .. } => {
                "name a file that exists (.jsonl, .json, .csv), or a hub id such as `AI-ModelScope/alpaca-gpt4-data-en`"
                    .to_owned()
            }
            DatasetError::BadRows { .. } => "write `path#500` for 500 rows".to_owned(),
        })
    }
}

/// Returns where a data set is. The entry may be `[HF::|MS::]id-or-path[:subset][#rows]`.
///
/// As in ms-swift a text that exists as a file as a whole is that file, whatever it contains.
/// Source: `swift/dataset/dataset_syntax.py`, `DatasetSyntax.parse`.
///
/// # Errors
///
/// It looks like a path and is not there, or the number of rows is none.
pub fn find_dataset(entry: &str, places: &Places) -> Result<FoundDataset, DatasetError> {
    // An empty text would be the working directory itself.
    let here = |text: &str| Some(places.resolve(text)).filter(|path| !text.is_empty() && path.exists());
    if let Some(path) = here(entry) {
        return Ok(FoundDataset::Here { path, rows: None });
    }
    let rest = ["hf::", "ms::"].iter().find_map(|prefix| strip_prefix_ignoring_case(entry, prefix));
    let is_hub = rest.is_some();
    let rest = rest.unwrap_or(entry);
    let (text, rows) = match rest.rsplit_once('#') {
        Some((text, rows)) => (text, Some(parse_rows(entry, rows)?)),
        None => (rest, None),
    };
    if let Some(path) = here(text) {
        return Ok(FoundDataset::Here { path, rows });
    }
    let id = text.split_once(':').map_or(text, |(id, _subsets)| id).trim();
    if let Some(path) = here(id) {
        return Ok(FoundDataset::Here { path, rows });
    }
    if !is_hub && (looks_like_path(id) || has_data_extension(id)) {
        return Err(DatasetError::MissingDataset { path: places.resolve(id) });
    }
    // A hub's data set may go without an organisation (`squad`), and ms-swift has built-in ones of one word.
    let plain = !id.is_empty() && id.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'));
    match plain || HubId::parse(id).is_some() {
        true => Ok(FoundDataset::Hub { id: id.to_owned(), rows }),
        false => Err(DatasetError::NoDataset { text: entry.to_owned() }),
    }
}

/// Returns where a cache has the files of a hub's data set. Caches may have it in a form that only their own library
/// reads: then it is not found here.
///
/// Source: the layouts of [`find_model`], with `datasets` for `models`.
pub fn dataset_in_caches(id: &str, places: &Places) -> Option<PathBuf> {
    let HubId { organisation, name } = HubId::parse(id)?;
    let hugging_face = || {
        let repository = places.hugging_face.as_ref()?.join(format!("datasets--{organisation}--{name}"));
        let commit = std::fs::read_to_string(repository.join("refs/main")).ok()?;
        named_snapshot(&repository.join("snapshots"), &commit).filter(|directory| directory.is_dir())
    };
    let modelscope = || {
        let cache = places.modelscope.as_ref()?;
        let places = [
            cache.join("datasets").join(format!("{organisation}--{name}")).join("snapshots/master"),
            cache.join("datasets").join(organisation).join(name),
            cache.join("hub/datasets").join(organisation).join(name),
        ];
        places.into_iter().find(|directory| directory.is_dir())
    };
    match places.use_hugging_face {
        true => hugging_face().or_else(modelscope),
        false => modelscope().or_else(hugging_face),
    }
}

fn strip_prefix_ignoring_case<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let start = text.get(..prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then(|| &text[prefix.len()..])
}

fn parse_rows(entry: &str, rows: &str) -> Result<u64, DatasetError> {
    let bad = || DatasetError::BadRows { text: entry.to_owned(), rows: rows.to_owned() };
    rows.trim().parse().map_err(|_| bad())
}

fn has_data_extension(text: &str) -> bool {
    [".jsonl", ".json", ".csv", ".txt", ".parquet"].iter().any(|end| text.to_ascii_lowercase().ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::tests::write_file;

    const HEADER: &str = r#"{"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}"#;

    struct Machine {
        root: tempfile::TempDir,
    }

    impl Machine {
        fn new() -> Machine {
            Machine { root: tempfile::tempdir().unwrap() }
        }

        fn places(&self) -> Places {
            let home = self.root.path().as_os_str().to_owned();
            Places::from_variables(self.root.path(), |name| (name == "HOME").then(|| home.clone()))
        }

        fn model_at(&self, path: &str) -> PathBuf {
            let directory = self.root.path().join(path);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("config.json"), r#"{"model_type":"qwen2"}"#).unwrap();
            directory
        }

        fn found(&self, model: &str) -> (PathBuf, Origin) {
            match find_model(model, &self.places()).unwrap() {
                FoundModel::Here(files) => (files.directory, files.origin),
                FoundModel::NotLocal { id } => panic!("{id} was not found"),
            }
        }
    }

    #[test]
    fn files_of_a_hubs_data_set_are_found_in_both_caches() {
        let machine = Machine::new();
        let make = |path: &str| {
            let directory = machine.root.path().join(path);
            std::fs::create_dir_all(&directory).unwrap();
            directory
        };
        assert_eq!(dataset_in_caches("org/data", &machine.places()), None);
        let repository = make(".cache/huggingface/hub/datasets--org--data/refs");
        std::fs::write(repository.join("main"), "abc\n").unwrap();
        let hugging_face = make(".cache/huggingface/hub/datasets--org--data/snapshots/abc");
        assert_eq!(dataset_in_caches("org/data", &machine.places()), Some(hugging_face.clone()));
        let modelscope = make(".cache/modelscope/datasets/org--data/snapshots/master");
        assert_eq!(dataset_in_caches("org/data", &machine.places()), Some(modelscope));
        let first = Places { use_hugging_face: true, ..machine.places() };
        assert_eq!(dataset_in_caches("org/data", &first), Some(hugging_face));
    }

    #[test]
    fn a_directory_is_found_from_the_working_directory_and_from_home() {
        let machine = Machine::new();
        let directory = machine.model_at("models/org/tiny");
        for text in ["models/org/tiny", "./models/org/tiny", "~/models/org/tiny", directory.to_str().unwrap()]
        {
            assert_eq!(
                machine.found(text).0.canonicalize().unwrap(),
                directory.canonicalize().unwrap(),
                "{text}"
            );
        }
    }

    #[test]
    fn a_hub_id_is_found_in_either_cache() {
        let machine = Machine::new();
        let id = "Qwen/Qwen2.5-7B";
        let repository = ".cache/huggingface/hub/models--Qwen--Qwen2.5-7B";
        assert_eq!(find_model(id, &machine.places()).unwrap(), FoundModel::NotLocal { id: id.to_owned() });
        let snapshot = machine.model_at(&format!("{repository}/snapshots/abc"));
        machine.model_at(&format!("{repository}/snapshots/def"));
        assert!(
            matches!(find_model(id, &machine.places()), Ok(FoundModel::NotLocal { .. })),
            "which of the two?"
        );
        std::fs::create_dir_all(machine.root.path().join(repository).join("refs")).unwrap();
        std::fs::write(machine.root.path().join(repository).join("refs/main"), "abc\n").unwrap();
        assert_eq!(machine.found(id), (snapshot, Origin::HuggingFaceCache));
        let copy = machine.model_at(".cache/modelscope/hub/models/Qwen/Qwen2___5-7B");
        assert_eq!(machine.found(id), (copy, Origin::ModelScopeCache));
        let present = machine.model_at(".cache/modelscope/models/Qwen--Qwen2.5-7B/snapshots/master");
        assert_eq!(machine.found(id), (present, Origin::ModelScopeCache));
        let places = Places { use_hugging_face: true, ..machine.places() };
        assert!(matches!(
            find_model(id, &places),
            Ok(FoundModel::Here(ModelFiles { origin: Origin::HuggingFaceCache, .. }))
        ));
    }

    #[test]
    fn a_ref_that_leads_out_of_the_cache_is_not_followed() {
        let machine = Machine::new();
        machine.model_at("elsewhere");
        let refs = machine.root.path().join(".cache/huggingface/hub/models--a--b/refs");
        std::fs::create_dir_all(&refs).unwrap();
        std::fs::write(refs.join("main"), "../../../../../elsewhere").unwrap();
        assert!(matches!(find_model("a/b", &machine.places()), Ok(FoundModel::NotLocal { .. })));
    }

    #[test]
    fn what_looks_like_a_path_and_is_not_there_is_an_error() {
        let machine = Machine::new();
        for text in ["/no/model", "./model", "../model", "~/model", "a/b/c", "model/"] {
            let error = find_model(text, &machine.places()).unwrap_err();
            assert!(matches!(error, ModelError::MissingModel { .. }), "{text}: {error}");
        }
        for text in ["", "tiny", "a b/c", "a/", "org/na:me"] {
            assert!(find_model(text, &machine.places()).is_err(), "{text}");
        }
        std::fs::write(machine.root.path().join("file"), "").unwrap();
        assert!(matches!(find_model("file", &machine.places()), Err(ModelError::NotADirectory { .. })));
        std::fs::create_dir(machine.root.path().join("empty")).unwrap();
        assert!(matches!(find_model("empty", &machine.places()), Err(ModelError::NoConfig { .. })));
    }

    #[test]
    fn weights_are_summed_over_the_shards_of_the_index_alone() {
        let machine = Machine::new();
        let directory = machine.model_at("model");
        for name in ["model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"] {
            write_file(&directory.join(name), HEADER, 8);
        }
        let bytes = |machine: &Machine| match find_model("model", &machine.places()) {
            Ok(FoundModel::Here(ModelFiles { weights: Some(weights), .. })) => weights.bytes(),
            other => panic!("{other:?}"),
        };
        assert_eq!(bytes(&machine), Bytes::new(16), "without an index: all but the second layout");
        let index = directory.join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map":{"a":"model-1.safetensors","b":"model-1.safetensors"}}"#)
            .unwrap();
        assert_eq!(bytes(&machine), Bytes::new(8));
        std::fs::write(&index, r#"{"weight_map":{"a":"model-3.safetensors"}}"#).unwrap();
        assert!(matches!(
            find_model("model", &machine.places()),
            Err(ModelError::Weights(WeightsError::MissingShard { .. }))
        ));
        std::fs::write(&index, r#"{"weight_map":{"a":"../secret"}}"#).unwrap();
        assert!(matches!(find_model("model", &machine.places()), Err(ModelError::BadJson { .. })));
    }

    #[test]
    fn old_weight_files_count_by_size_and_no_weights_are_none() {
        let machine = Machine::new();
        let mut directory = machine.model_at("model");
        let weights = |machine: &Machine| match find_model("model", &machine.places()) {
            Ok(FoundModel::Here(files)) => files.weights,
            other => panic!("{other:?}"),
        };
        assert_eq!(weights(&machine), None);
        std::fs::write(directory.join("pytorch_model-1.bin"), [0; 10]).unwrap();
        std::fs::write(directory.join("training_args.bin"), [0; 10]).unwrap();
        assert_eq!(weights(&machine), Some(LocalWeights::FileSizes { bytes: Bytes::new(10) }));
        for (stated, parameters) in [("bfloat16", Some(5)), ("float32", Some(2)), ("int8", None)] {
            let config = serde_json::json!({"torch_dtype": stated});
            let weights = Some(LocalWeights::FileSizes { bytes: Bytes::new(10) });
            let files = ModelFiles { directory, origin: Origin::Directory, config, weights };
            assert_eq!(files.weight_files().map(|files| files.parameters), Some(parameters), "{stated}");
            directory = files.directory;
        }
    }

    #[test]
    fn caches_are_where_the_variables_say() {
        let of = |pairs: &[(&str, &str)]| {
            Places::from_variables(Path::new("/w"), |name| {
                pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
            })
        };
        let hugging_face = |pairs: &[(&str, &str)]| of(pairs).hugging_face.unwrap();
        assert_eq!(hugging_face(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(
            hugging_face(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]),
            Path::new("/x/huggingface/hub")
        );
        assert_eq!(hugging_face(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), Path::new("/h/hf/hub"));
        assert_eq!(hugging_face(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(of(&[("HOME", "/h")]).modelscope.unwrap(), Path::new("/h/.cache/modelscope"));
        assert_eq!(of(&[("MODELSCOPE_CACHE", "/m"), ("USE_HF", "1")]).modelscope.unwrap(), Path::new("/m"));
        assert!(of(&[("USE_HF", "true")]).use_hugging_face && !of(&[("USE_HF", "0")]).use_hugging_face);
        assert_eq!(of(&[]).hugging_face, None);
    }

    #[test]
    fn a_dataset_is_a_file_a_hub_id_or_an_error() {
        let machine = Machine::new();
        let file = machine.root.path().join("rows.jsonl");
        std::fs::write(&file, "").unwrap();
        let odd = machine.root.path().join("a#b.jsonl");
        std::fs::write(&odd, "").unwrap();
        let find = |text: &str| find_dataset(text, &machine.places());
        assert_eq!(find("rows.jsonl"), Ok(FoundDataset::Here { path: file.clone(), rows: None }));
        assert_eq!(find("rows.jsonl#500"), Ok(FoundDataset::Here { path: file, rows: Some(500) }));
        assert_eq!(find("a#b.jsonl"), Ok(FoundDataset::Here { path: odd, rows: None }));
        let hub = |id: &str, rows| Ok(FoundDataset::Hub { id: id.to_owned(), rows });
        assert_eq!(find("HF::org/data:en/zh#20"), hub("org/data", Some(20)));
        assert_eq!(find("ms::org/data"), hub("org/data", None));
        assert_eq!(find("CodyWhy/mh-sharegpt-20250820"), hub("CodyWhy/mh-sharegpt-20250820", None));
        for text in ["./absent", "/absent.jsonl", "absent.jsonl", "absent.jsonl#5", "a/b/c", "~/x"] {
            assert!(matches!(find(text), Err(DatasetError::MissingDataset { .. })), "{text}");
        }
        assert!(matches!(find("rows.jsonl#many"), Err(DatasetError::BadRows { .. })));
        for text in ["", "#5", "a b", "::"] {
            assert!(matches!(find(text), Err(DatasetError::NoDataset { .. })), "{text}");
        }
    }
}
