//! Which rows are in the files of a data set?
//!
//! A file of gigabytes is not read whole. It is cut into portions that are visited in an order which is spread evenly over
//! all files at every moment, until all are read or the time is over. What was read by then stands for the rest.
//!
//! ```text
//! jsonl, txt   blocks of bytes; a row belongs to the block in which its first byte lies
//! parquet      row groups; the number of rows is known without reading them
//! json, csv    from the beginning: where a row begins is not known before what stands in front of it is read;
//!              so are objects that are spread over lines, whatever the file is called
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mhtrain_sizing::unique_json::Unique;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Longest row that is read; a row of a million tokens has about 4 MiB.
const ROW_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a portion of a file of lines: about 20 ms of work, so that the end of the time is met.
const BLOCK_BYTES: u64 = 64 << 10;

/// Longest file of objects that are spread over lines: the library that ms-swift reads them with takes a file in blocks of this
/// size, and mostly refuses one whose block ends inside of an object. Source: `chunksize // 32` in
/// `datasets/packaged_modules/json/json.py`, 3.6.0 and 4.8.4; tried around that size with both lines of ms-swift.
const SPREAD_BYTES_MAX: u64 = (10 << 20) / 32;

/// Rows whose columns are looked at to know the form of all.
const COLUMN_ROWS: usize = 100;

/// Most files of a data set. A directory with more is not looked at: some of its files would pass for all.
const FILES_MAX: usize = 1000;

/// A format of data files.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Format {
    /// Objects, each within one line.
    JsonLines,
    /// Objects over several lines.
    JsonStream,
    /// A list of objects.
    Json,
    Csv,
    Text,
    Parquet,
}

/// Why the rows of a data set cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be opened or read.
    #[error("cannot read {}: {what}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// A directory without data files, or a file of an unknown format.
    #[error("{} holds no jsonl, json, csv, txt or parquet data", path.display())]
    NoData {
        /// Which.
        path: PathBuf,
    },
    /// A directory with more files than are looked at.
    #[error("{} holds more than {FILES_MAX} files", path.display())]
    TooMany {
        /// Which.
        path: PathBuf,
    },
}

/// The files of one data set, opened so far that their rows can be read.
#[derive(Debug)]
pub struct DataFiles {
    files: Vec<DataFile>,
    columns: BTreeSet<String>,
}

#[derive(Debug)]
struct DataFile {
    path: PathBuf,
    format: Format,
    bytes: u64,
    /// Rows of each row group, and its bytes; parquet only.
    row_groups: Vec<(u64, u64)>,
}

/// Something that is read from one end to the other.
#[derive(Copy, Clone, Debug)]
struct Portion {
    file: usize,
    kind: PortionKind,
}

#[derive(Copy, Clone, Debug)]
enum PortionKind {
    Block { from: u64, to: u64 },
    RowGroup { index: usize },
    Whole,
}

/// How much of a data set was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows that were handed out.
    pub rows_read: u64,
    /// Bytes of the files that they came from.
    pub bytes_read: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Rows of all files: counted, or estimated from the bytes of those that were read.
    pub rows: u64,
    /// Whether `rows` is counted.
    pub rows_known: bool,
}

/// Returns the data files of a path: itself, or those in a directory and its sub-directories.
///
/// Of a directory only files are taken that are of the train split by their names, if any is.
///
/// # Errors
/// There are none or too many, or the directory cannot be read.
pub fn data_files(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let none = || DataError::NoData { path: path.to_owned() };
    if !path.is_dir() {
        return if format_of(path).is_some() { Ok(vec![path.to_owned()]) } else { Err(none()) };
    }
    let mut files = Vec::new();
    collect(path, 0, &mut files)
        .map_err(|e| DataError::Unreadable { path: path.to_owned(), what: e.to_string() })?;
    files.sort();
    let is_train = |file: &PathBuf| {
        file.strip_prefix(path).is_ok_and(|inside| inside.to_string_lossy().to_lowercase().contains("train"))
    };
    if files.iter().any(is_train) {
        files.retain(is_train);
    }
    if files.len() > FILES_MAX {
        return Err(DataError::TooMany { path: path.to_owned() });
    }
    if files.is_empty() { Err(none()) } else { Ok(files) }
}

/// Collects data files down to two levels; `data/train-00000-of-00001.parquet` is how hubs keep them.
fn collect(directory: &Path, depth: u32, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || name.starts_with("dataset_info") {
            continue;
        }
        if path.is_dir() && depth < 2 {
            collect(&path, depth + 1, files)?;
        } else if format_of(&path).is_some() {
            files.push(path);
        }
    }
    Ok(())
}

fn format_of(path: &Path) -> Option<Format> {
    Some(match path.extension()?.to_str()?.to_lowercase().as_str() {
        "jsonl" => Format::JsonLines,
        "json" => Format::Json,
        "csv" => Format::Csv,
        "txt" => Format::Text,
        "parquet" => Format::Parquet,
        _ => return None,
    })
}

impl DataFiles {
    /// Opens the files of a data set and reads which columns it has.
    ///
    /// # Errors
    /// A file cannot be opened, or is not what its name says.
    pub fn open(paths: &[PathBuf]) -> Result<DataFiles, DataError> {
        let mut files = Vec::new();
        for path in paths {
            files.push(DataFile::open(path)?);
        }
        let columns = match files.first() {
            Some(file) => file.columns().map_err(|what| file.unreadable(what))?,
            None => BTreeSet::new(),
        };
        Ok(DataFiles { files, columns })
    }

    /// Returns the names of the columns.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(String::as_str)
    }

    /// Hands rows to `each`, on `threads` threads, until all were handed out or `each` breaks.
    ///
    /// `each` is given a row, or why the trainer could not read it and would stop.
    ///
    /// # Errors
    /// A file is damaged in a way that leaves nothing to count behind that place: how many rows there would have been
    /// cannot be said.
    pub fn read(
        &self,
        threads: usize,
        each: &(dyn Fn(Result<Value, String>) -> ControlFlow<()> + Sync),
    ) -> Result<Progress, DataError> {
        let portions = self.portions();
        let order = spread(portions.len());
        let (next, rows, bytes) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let unfinished = AtomicUsize::new(portions.len());
        let damage: Mutex<Option<DataError>> = Mutex::new(None);
        let work = || {
            while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                let portion = portions[index];
                let file = &self.files[portion.file];
                let mut handed = 0;
                let mut give = |row: Result<Value, String>| {
                    handed += 1;
                    each(row.map_err(|what| format!("{}: {what}", file.path.display())))
                };
                let (read, whole) = match file.read(portion.kind, &mut give) {
                    Ok(read) => read,
                    Err(what) => {
                        let mut damage = damage.lock().unwrap_or_else(PoisonError::into_inner);
                        damage.get_or_insert(file.unreadable(what));
                        break;
                    }
                };
                rows.fetch_add(handed, Ordering::Relaxed);
                bytes.fetch_add(read, Ordering::Relaxed);
                if !whole {
                    break;
                }
                unfinished.fetch_sub(1, Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(portions.len()) {
                scope.spawn(work);
            }
            work();
        });
        if let Some(damage) = damage.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(damage);
        }
        let (rows_read, bytes_read) = (rows.into_inner(), bytes.into_inner());
        let all = self.files.iter().map(|file| file.bytes).sum();
        let counted = self.rows_by_metadata();
        let rows_known = unfinished.into_inner() == 0 || counted.is_some();
        let rows = match counted {
            Some(rows) => rows,
            None if rows_known => rows_read,
            None => estimate(rows_read, all, bytes_read),
        };
        Ok(Progress { rows_read, bytes_read, bytes: all, rows, rows_known })
    }

    /// Returns the number of rows where every file says it.
    fn rows_by_metadata(&self) -> Option<u64> {
        let all_parquet = self.files.iter().all(|file| file.format == Format::Parquet);
        let rows = self.files.iter().flat_map(|file| &file.row_groups).map(|(rows, _)| rows).sum();
        (all_parquet && !self.files.is_empty()).then_some(rows)
    }

    fn portions(&self) -> Vec<Portion> {
        let mut portions = Vec::new();
        for (file, data) in self.files.iter().enumerate() {
            let kinds: Vec<PortionKind> = match data.format {
                Format::JsonLines | Format::Text => (0..data.bytes.div_ceil(BLOCK_BYTES))
                    .map(|block| PortionKind::Block {
                        from: block * BLOCK_BYTES,
                        to: ((block + 1) * BLOCK_BYTES).min(data.bytes),
                    })
                    .collect(),
                Format::Parquet => {
                    (0..data.row_groups.len()).map(|index| PortionKind::RowGroup { index }).collect()
                }
                Format::Json | Format::JsonStream | Format::Csv => vec![PortionKind::Whole],
            };
            portions.extend(kinds.into_iter().map(|kind| Portion { file, kind }));
        }
        portions
    }
}

fn estimate(rows_read: u64, bytes: u64, bytes_read: u64) -> u64 {
    let rows = u128::from(rows_read) * u128::from(bytes) / u128::from(bytes_read.max(1));
    u64::try_from(rows).unwrap_or(u64::MAX).max(rows_read)
}

/// Returns the numbers below `count` in an order of which every beginning is spread evenly: steps of the golden section,
/// as in a low-discrepancy sequence (Weyl 1916).
fn spread(count: usize) -> Vec<usize> {
    let golden = (count * 618 / 1000).max(1);
    // A step that shares no divisor with the count meets every number.
    let step = (golden..).find(|step| greatest_common_divisor(*step, count) == 1).unwrap_or(1);
    std::iter::successors(Some(0), |at| Some((at + step) % count)).take(count).collect()
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// How many bytes were read, and whether that was all.
type PortionRead = Result<(u64, bool), String>;

/// Takes a row; breaks when no more is wanted.
type Give<'a> = &'a mut dyn FnMut(Result<Value, String>) -> ControlFlow<()>;

impl DataFile {
    fn open(path: &Path) -> Result<DataFile, DataError> {
        let unreadable = |what: String| DataError::Unreadable { path: path.to_owned(), what };
        let mut format = format_of(path).ok_or_else(|| DataError::NoData { path: path.to_owned() })?;
        let file = File::open(path).map_err(|e| unreadable(e.to_string()))?;
        let found = file.metadata().map_err(|e| unreadable(e.to_string()))?;
        if !found.is_file() {
            return Err(unreadable("it is no file".to_owned()));
        }
        let mut row_groups = Vec::new();
        match format {
            Format::Parquet => {
                let reader = SerializedFileReader::new(file).map_err(|e| unreadable(e.to_string()))?;
                row_groups = reader
                    .metadata()
                    .row_groups()
                    .iter()
                    .map(|group| {
                        let size = |number: i64| u64::try_from(number).unwrap_or(0);
                        (size(group.num_rows()), size(group.compressed_size()))
                    })
                    .collect();
            }
            // A .json file may hold lines, and a .jsonl file a list: the library that ms-swift reads them with takes both.
            Format::Json | Format::JsonLines => {
                let begins = |e: std::io::Error| unreadable(e.to_string());
                format = match first_letter(file).map_err(begins)? {
                    Some(b'[') => Format::Json,
                    Some(b'{') if first_object_has_lines(path).map_err(begins)? => Format::JsonStream,
                    Some(_) | None => Format::JsonLines,
                };
            }
            Format::JsonStream | Format::Csv | Format::Text => {}
        }
        if format == Format::JsonStream && found.len() > SPREAD_BYTES_MAX {
            return Err(unreadable(format!(
                "its objects are spread over lines, and the trainer mostly refuses such a file above {} KiB; write one \
                 object a line",
                SPREAD_BYTES_MAX >> 10
            )));
        }
        let bytes = match format {
            Format::Parquet => row_groups.iter().map(|(_, bytes)| bytes).sum(),
            Format::JsonLines | Format::JsonStream | Format::Json | Format::Csv | Format::Text => found.len(),
        };
        Ok(DataFile { path: path.to_owned(), format, bytes, row_groups })
    }

    fn unreadable(&self, what: String) -> DataError {
        DataError::Unreadable { path: self.path.clone(), what }
    }

    fn columns(&self) -> Result<BTreeSet<String>, String> {
        let mut columns = BTreeSet::new();
        if self.format == Format::Text {
            return Ok(BTreeSet::from(["text".to_owned()]));
        }
        let (mut rows, mut problems) = (0, Vec::new());
        let mut look = |row: Result<Value, String>| {
            match row {
                Ok(Value::Object(row)) => columns.extend(row.into_iter().map(|(name, _)| name)),
                Ok(_) => {}
                Err(problem) => problems.push(problem),
            }
            rows += 1;
            if rows < COLUMN_ROWS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let first = match self.format {
            Format::Parquet if self.row_groups.is_empty() => return Ok(columns),
            Format::Parquet => PortionKind::RowGroup { index: 0 },
            Format::JsonLines | Format::Text => PortionKind::Block { from: 0, to: self.bytes },
            Format::Json | Format::JsonStream | Format::Csv => PortionKind::Whole,
        };
        self.read(first, &mut look)?;
        match problems.into_iter().next() {
            // Nothing of a row was seen.
            Some(problem) if self.format == Format::JsonLines && columns.is_empty() => Err(problem),
            Some(_) | None => Ok(columns),
        }
    }

    fn read(&self, portion: PortionKind, give: Give<'_>) -> PortionRead {
        match (self.format, portion) {
            (Format::Parquet, PortionKind::RowGroup { index }) => self.read_row_group(index, give),
            (Format::Csv, _) => self.read_csv(give),
            (Format::Json, _) => self.read_list(give),
            (Format::JsonStream, _) => self.read_objects(give),
            (_, PortionKind::Block { from, to }) => self.read_lines(from, to, give),
            (_, PortionKind::Whole | PortionKind::RowGroup { .. }) => self.read_lines(0, self.bytes, give),
        }
    }

    /// Reads the lines whose first byte lies in `from..to`.
    fn read_lines(&self, from: u64, to: u64, give: Give<'_>) -> PortionRead {
        let text = |e: std::io::Error| e.to_string();
        let mut file = File::open(&self.path).map_err(text)?;
        // Of the byte in front one learns whether a line begins at `from`.
        let mut at = from.saturating_sub(1);
        file.seek(SeekFrom::Start(at)).map_err(text)?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        if from > 0 {
            at += skip_line(&mut reader).map_err(text)?;
        }
        while at < to {
            line.clear();
            let read = reader.by_ref().take(ROW_BYTES_MAX).read_until(b'\n', &mut line).map_err(text)? as u64;
            if read == 0 {
                break;
            }
            if read == ROW_BYTES_MAX {
                return Err(format!("a row is longer than {} MiB", ROW_BYTES_MAX >> 20));
            }
            let start = at;
            at += read;
            let mark: &[u8] = if start == 0 { b"\xef\xbb\xbf" } else { b"" };
            let content = line.strip_prefix(mark).unwrap_or(&line).trim_ascii();
            if content.is_empty() {
                continue;
            }
            let rows = match self.format {
                Format::Text => vec![text_row(content)],
                _ => match json_rows(content) {
                    Ok(rows) => rows.into_iter().map(Ok).collect(),
                    Err(NoRows::Unfinished(what)) => {
                        if goes_on(content.to_vec(), &mut reader).map_err(text)? {
                            return Err(format!(
                                "the object at byte {start} is spread over lines, behind others that are not"
                            ));
                        }
                        reader.seek(SeekFrom::Start(at)).map_err(text)?;
                        vec![Err(what)]
                    }
                    Err(NoRows::Damaged(what)) => vec![Err(what)],
                },
            };
            for row in rows {
                let row = match row {
                    // Tried with ms-swift 4.6.0 and 3.12.6: the process ends by a signal.
                    Ok(Value::Null) if start == 0 => Err("is null, and no first row can be".to_owned()),
                    row => row,
                };
                let row = row.map_err(|what| format!("the line at byte {start} {what}"));
                if give(row).is_break() {
                    return Ok((at.saturating_sub(from), false));
                }
            }
        }
        Ok((to - from, true))
    }

    /// Reads objects that are spread over lines, one after the other.
    fn read_objects(&self, give: Give<'_>) -> PortionRead {
        let read = Arc::new(AtomicU64::new(0));
        let file = File::open(&self.path).map_err(|e| e.to_string())?;
        let counted = Counted { file, read: Arc::clone(&read) };
        let reader = BufReader::new(WithoutNan::new(counted));
        for row in serde_json::Deserializer::from_reader(reader).into_iter::<Unique>() {
            let row = row.map_err(|e| no_json(&e))?.0;
            if give(json_row(row)).is_break() {
                return Ok((read.load(Ordering::Relaxed), false));
            }
        }
        Ok((self.bytes, true))
    }

    fn read_csv(&self, give: Give<'_>) -> PortionRead {
        let mut reader =
            csv::ReaderBuilder::new().flexible(true).from_path(&self.path).map_err(|e| e.to_string())?;
        let names = reader.headers().map_err(|e| e.to_string())?.clone();
        let mut record = csv::StringRecord::new();
        let mut last = 0;
        // pandas takes the cells that the first row has more than the header for an index, and then no more than those.
        let mut cells_max = None;
        loop {
            let start = reader.position().byte();
            let row = match reader.read_record(&mut record) {
                Ok(false) => {
                    return if self.ends_in_quotes(last).map_err(|e| e.to_string())? {
                        Err("a quoted cell has no end".to_owned())
                    } else {
                        Ok((self.bytes, true))
                    };
                }
                Ok(true) if record.len() > *cells_max.get_or_insert(names.len().max(record.len())) => {
                    Err(format!("the row at byte {start} has {} cells, the first has fewer", record.len()))
                }
                Ok(true) => {
                    let cells = names.iter().zip(&record);
                    Ok(cells.map(|(name, cell)| (name.to_owned(), cell.into())).collect::<Map<_, _>>().into())
                }
                Err(error) if error.is_io_error() => return Err(error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            last = start;
            if give(row).is_break() {
                return Ok((reader.position().byte(), false));
            }
        }
    }

    /// Returns whether the text from `from` on ends inside of a quoted cell: the file was cut off. The parser takes the end of
    /// the file for the end of the cell, and pandas does not.
    fn ends_in_quotes(&self, from: u64) -> std::io::Result<bool> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(from))?;
        let mut text = Vec::new();
        file.take(ROW_BYTES_MAX).read_to_end(&mut text)?;
        let (mut is_quoted, mut may_open) = (false, true);
        for byte in text {
            match (byte, is_quoted) {
                // The end of the cell, or the first of two that stand for one.
                (b'"', true) => (is_quoted, may_open) = (false, true),
                (b'"', false) if may_open => is_quoted = true,
                (b',' | b'\n' | b'\r', false) => may_open = true,
                (_, false) => may_open = false,
                (_, true) => {}
            }
        }
        Ok(is_quoted)
    }

    fn read_list(&self, give: Give<'_>) -> PortionRead {
        let read = Arc::new(AtomicU64::new(0));
        let file = File::open(&self.path).map_err(|e| e.to_string())?;
        let counted = Counted { file, read: Arc::clone(&read) };
        let mut is_broken_off = false;
        let mut deserializer =
            serde_json::Deserializer::from_reader(BufReader::new(WithoutNan::new(counted)));
        let each = EachRow { give, is_broken_off: &mut is_broken_off };
        let result = each.deserialize(&mut deserializer);
        match result {
            _ if is_broken_off => Ok((read.load(Ordering::Relaxed), false)),
            Ok(()) => Ok((self.bytes, true)),
            Err(error) => Err(error.to_string()),
        }
    }

    fn read_row_group(&self, index: usize, give: Give<'_>) -> PortionRead {
        let text = |e: parquet::errors::ParquetError| e.to_string();
        let file = File::open(&self.path).map_err(|e| e.to_string())?;
        let reader = SerializedFileReader::new(file).map_err(text)?;
        let group = reader.get_row_group(index).map_err(text)?;
        let (rows, bytes) = self.row_groups.get(index).copied().unwrap_or_default();
        let mut done = 0;
        for row in group.get_row_iter(None).map_err(text)? {
            done += 1;
            let row = row.map_err(text)?.to_json_value();
            if give(Ok(row)).is_break() {
                return Ok((bytes * done / rows.max(1), false));
            }
        }
        Ok((bytes, true))
    }
}

fn text_row(line: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(line).map_err(|e| format!("is no text: {e}"))?.to_owned();
    Ok(Value::Object(Map::from_iter([("text".to_owned(), Value::String(text))])))
}

/// Why a line holds no rows; a clause that follows "the line".
enum NoRows {
    /// It ends inside of a value.
    Unfinished(String),
    /// It is no JSON, or none of a row.
    Damaged(String),
}

/// Returns the rows of a line. The library that ms-swift reads lines with takes several objects on one, with or without
/// blanks between them, and the numbers that JSON has no word for, and refuses an object with two equal keys.
///
/// Source: tried with `load_dataset` of ms-swift 4.6.0 and 3.12.6; `docs/sizing.md`, section 5.
fn json_rows(line: &[u8]) -> Result<Vec<Value>, NoRows> {
    let parsed = |line: &[u8]| -> Result<Vec<Value>, serde_json::Error> {
        serde_json::Deserializer::from_slice(line).into_iter::<Unique>().map(|row| Ok(row?.0)).collect()
    };
    let rows = parsed(line).or_else(|error| {
        // The usual line has no such number, and is not read twice.
        let mut words = Vec::with_capacity(line.len());
        match WithoutNan::new(line).read_to_end(&mut words) {
            Ok(_) if words != line => parsed(&words),
            Ok(_) | Err(_) => Err(error),
        }
    });
    match rows {
        Ok(rows) => rows.into_iter().map(json_row).collect::<Result<_, _>>().map_err(NoRows::Damaged),
        Err(error) if error.is_eof() => Err(NoRows::Unfinished(no_json(&error))),
        Err(error) => Err(NoRows::Damaged(no_json(&error))),
    }
}

fn no_json(error: &serde_json::Error) -> String {
    if error.is_data() {
        format!("has an object with a key twice: {error}")
    } else {
        format!("is no JSON: {error}")
    }
}

/// Returns a value as a row: what is no object is none for the library that ms-swift reads with, either, and stops it; but
/// for `null`, of which it makes a row without anything, and its template leaves that out.
fn json_row(row: Value) -> Result<Value, String> {
    match row {
        Value::Object(_) | Value::Null => Ok(row),
        _ => Err("is no JSON object".to_owned()),
    }
}

/// Returns whether the first object of a file ends on a later line than it begins on.
fn first_object_has_lines(path: &Path) -> std::io::Result<bool> {
    let mut reader = BufReader::new(File::open(path)?);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(ROW_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(false);
        }
        let content = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line).trim_ascii();
        // What is longer is refused as spread over lines, and is much to read.
        if content.len() as u64 > SPREAD_BYTES_MAX {
            return Ok(false);
        }
        if !content.is_empty() {
            let is_unfinished = matches!(json_rows(content), Err(NoRows::Unfinished(_)));
            return Ok(is_unfinished && goes_on(content.to_vec(), &mut reader)?);
        }
    }
}

/// Returns whether a value that a line ends inside of is whole together with the lines that follow.
fn goes_on(mut text: Vec<u8>, reader: &mut impl BufRead) -> std::io::Result<bool> {
    // Read again each time twice as much is there, so that a long object is not read once for each of its lines.
    let mut read_again = text.len();
    loop {
        text.push(b'\n');
        let left = ROW_BYTES_MAX.saturating_sub(text.len() as u64);
        let is_end = reader.by_ref().take(left).read_until(b'\n', &mut text)? == 0;
        if text.len() as u64 > SPREAD_BYTES_MAX {
            return Ok(true);
        }
        if is_end || text.len() >= 2 * read_again {
            let words = WithoutNan::new(&text[..]);
            let first =
                serde_json::Deserializer::from_reader(BufReader::new(words)).into_iter::<Unique>().next();
            match first {
                Some(Err(error)) if error.is_eof() && !is_end => read_again = text.len(),
                Some(first) => return Ok(first.is_ok()),
                None => return Ok(false),
            }
        }
    }
}

/// Numbers that JSON has no word for, as the parser of that library reads them (RapidJSON, `kParseNanAndInfFlag`).
const NO_NUMBERS: [&[u8]; 6] = [b"NaN", b"-NaN", b"Inf", b"-Inf", b"Infinity", b"-Infinity"];

/// JSON whose numbers that JSON has no word for are `null`; all else is as it was.
struct WithoutNan<R> {
    from: R,
    /// What was read and not handed out yet.
    ready: Vec<u8>,
    handed: usize,
    /// The beginning of a word that may be such a number, with its sign.
    word: Vec<u8>,
    is_quoted: bool,
    is_escaped: bool,
}

impl<R: Read> WithoutNan<R> {
    fn new(from: R) -> WithoutNan<R> {
        let (ready, word) = (Vec::new(), Vec::new());
        WithoutNan { from, ready, handed: 0, word, is_quoted: false, is_escaped: false }
    }

    fn take_all(&mut self, mut piece: &[u8]) {
        while let Some(byte) = piece.first() {
            let ends: &[u8] = if self.is_quoted { b"\"\\" } else { b"\"NI-" };
            let is_plain = self.word.is_empty() && !self.is_escaped;
            let plain = piece.iter().position(|byte| ends.contains(byte)).unwrap_or(piece.len());
            if is_plain && plain > 0 {
                self.ready.extend_from_slice(&piece[..plain]);
                piece = &piece[plain..];
            } else {
                self.take(*byte);
                piece = &piece[1..];
            }
        }
    }

    fn take(&mut self, byte: u8) {
        if self.is_quoted {
            self.ready.push(byte);
            (self.is_quoted, self.is_escaped) =
                (self.is_escaped || byte != b'"', !self.is_escaped && byte == b'\\');
            return;
        }
        self.word.push(byte);
        if !NO_NUMBERS.iter().any(|word| word.starts_with(&self.word)) {
            self.word.pop();
            self.end_word();
            // It may be the first of the next.
            self.word.push(byte);
            if !NO_NUMBERS.iter().any(|word| word.starts_with(&self.word)) {
                self.is_quoted = byte == b'"';
                self.ready.append(&mut self.word);
            }
        }
    }

    /// Hands out a word that nothing more belongs to.
    fn end_word(&mut self) {
        if NO_NUMBERS.contains(&&self.word[..]) {
            self.word.clear();
            self.ready.extend_from_slice(b"null");
        } else {
            self.ready.append(&mut self.word);
        }
    }
}

impl<R: Read> Read for WithoutNan<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.handed == self.ready.len() {
            self.ready.clear();
            self.handed = 0;
            let mut piece = [0; 8192];
            let read = self.from.read(&mut piece)?;
            self.take_all(&piece[..read]);
            if read == 0 {
                self.end_word();
                if self.ready.is_empty() {
                    return Ok(0);
                }
            }
        }
        let length = buffer.len().min(self.ready.len() - self.handed);
        buffer[..length].copy_from_slice(&self.ready[self.handed..self.handed + length]);
        self.handed += length;
        Ok(length)
    }
}

/// Returns the first byte that is no blank, and no byte order mark.
fn first_letter(file: File) -> std::io::Result<Option<u8>> {
    let mut start = Vec::new();
    file.take(4096).read_to_end(&mut start)?;
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&start);
    Ok(text.trim_ascii_start().first().copied())
}

/// Skips to behind the end of a line, and returns how far that was.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let (length, found) = match buffer.iter().position(|byte| *byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), false),
        };
        reader.consume(length);
        skipped += length as u64;
        if found || length == 0 {
            return Ok(skipped);
        }
    }
}

/// A file that counts what is read of it.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// Hands out the elements of a JSON list one by one, so that the list is never whole in memory.
struct EachRow<'a, 'b> {
    give: Give<'a>,
    is_broken_off: &'b mut bool,
}

impl<'de> DeserializeSeed<'de> for EachRow<'_, '_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for EachRow<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        while let Some(row) = rows.next_element::<Value>()? {
            if (self.give)(Ok(row)).is_break() {
                *self.is_broken_off = true;
                return Err(serde::de::Error::custom("no more is wanted"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// Writes files and returns their directory.
    fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        directory
    }

    /// Reads rows until `most`, and returns their ids.
    fn ids(files: &DataFiles, threads: usize, most: usize) -> (Vec<u64>, Progress) {
        let seen = Mutex::new(Vec::new());
        let progress = files.read(threads, &|row| {
            let mut seen = seen.lock().unwrap();
            seen.push(row.unwrap()["id"].to_string().trim_matches('"').parse().unwrap());
            if seen.len() >= most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        (seen, progress.unwrap())
    }

    fn lines(rows: u64) -> String {
        // Rows of unequal length, so that blocks begin at every place of a row.
        (0..rows)
            .map(|id| format!("{{\"id\": {id}, \"text\": \"{}\"}}\n", "x".repeat((id * 37 % 900) as usize)))
            .collect()
    }

    #[test]
    fn every_row_of_every_format_is_read_once() {
        let list = format!("[{}]", lines(2000).trim_end().replace('\n', ", "));
        let csv: String = (0..2000).map(|id| format!("{id},\"two\nlines, and \"\"quotes\"\"\"\n")).collect();
        let files: [(&str, &[u8]); 4] = [
            ("a.jsonl", &lines(2000).into_bytes()),
            ("b.json", &list.into_bytes()),
            ("c.csv", &format!("id,text\n{csv}").into_bytes()),
            ("lines.json", &lines(2000).replace('\n', "\r\n\r\n").into_bytes()),
        ];
        let directory = directory(&files);
        for (name, _) in files {
            let files = DataFiles::open(&[directory.path().join(name)]).unwrap();
            assert_eq!(files.columns().collect::<Vec<_>>(), ["id", "text"], "{name}");
            let (seen, progress) = ids(&files, 3, usize::MAX);
            assert_eq!(seen, (0..2000).collect::<Vec<_>>(), "{name}");
            assert!(progress.rows_known && progress.rows == 2000, "{name}: {progress:?}");
            assert_eq!(progress.bytes_read, progress.bytes, "{name}");
        }
    }

    /// Returns a parquet file of row groups of `rows` rows each, with an id and a conversation of two turns, as hubs keep them:
    /// columns id, messages.list.element.role and messages.list.element.content.
    fn parquet_file(groups: &[u64], compression: Compression) -> Vec<u8> {
        let schema =
            "message rows { required int64 id; optional group messages (LIST) { repeated group list {
            optional group element { optional binary role (UTF8); optional binary content (UTF8); } } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let settings = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut file = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut file, schema, settings).unwrap();
        let mut first = 0;
        for rows in groups {
            let ids: Vec<i64> = (first..first + rows).map(|id| i64::try_from(id).unwrap()).collect();
            first += rows;
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            // Every list has two elements: the first begins the row, the second goes on in it; nothing is null.
            let (there, begins) = (vec![4; 2 * ids.len()], [0, 1].repeat(ids.len()));
            let roles = |_: &i64| ["user".to_owned(), "assistant".to_owned()];
            let contents =
                |id: &i64| [format!("question {id}"), "x".repeat(usize::try_from(id % 50).unwrap())];
            for text in [&roles as &dyn Fn(&i64) -> [String; 2], &contents] {
                let values: Vec<ByteArray> =
                    ids.iter().flat_map(text).map(|value| value.as_str().into()).collect();
                let mut column = group.next_column().unwrap().unwrap();
                column.typed::<ByteArrayType>().write_batch(&values, Some(&there), Some(&begins)).unwrap();
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.close().unwrap();
        file
    }

    #[test]
    fn every_row_of_a_parquet_file_is_read_once_with_what_is_nested_in_it() {
        let zstd = Compression::ZSTD(ZstdLevel::default());
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, zstd] {
            let file = parquet_file(&[700, 1, 299], compression);
            let directory = directory(&[("data/train-00000-of-00001.parquet", &file)]);
            let files = DataFiles::open(&data_files(directory.path()).unwrap()).unwrap();
            assert_eq!(files.columns().collect::<Vec<_>>(), ["id", "messages"]);
            let (seen, progress) = ids(&files, 2, usize::MAX);
            assert_eq!(seen, (0..1000).collect::<Vec<_>>());
            assert!(progress.rows_known && progress.rows == 1000, "{progress:?}");
            let rows = Mutex::new(Vec::new());
            let read = files.read(1, &|row| {
                rows.lock().unwrap().push(row.unwrap());
                ControlFlow::Continue(())
            });
            assert!(read.is_ok());
            let rows = rows.into_inner().unwrap();
            let seventh = rows.iter().find(|row| row["id"] == 7).unwrap();
            let messages = serde_json::json!([
                {"role": "user", "content": "question 7"}, {"role": "assistant", "content": "xxxxxxx"}]);
            assert_eq!(seventh["messages"], messages);
        }
    }

    #[test]
    fn a_parquet_file_that_is_cut_off_is_an_error_and_no_panic() {
        let whole = parquet_file(&[50], Compression::SNAPPY);
        for length in [0, 3, 4, whole.len() / 2, whole.len() - 1] {
            let directory = directory(&[("a.parquet", &whole[..length])]);
            assert!(DataFiles::open(&[directory.path().join("a.parquet")]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_look_that_is_broken_off_is_spread_over_the_file_and_estimates_the_rows() {
        let directory = directory(&[("a.jsonl", lines(20_000).as_bytes())]);
        let files = DataFiles::open(&[directory.path().join("a.jsonl")]).unwrap();
        let (seen, progress) = ids(&files, 1, 2000);
        assert_eq!(seen.len(), 2000);
        assert!(!progress.rows_known && progress.bytes_read < progress.bytes);
        let error = (progress.rows as f64 - 20_000.0).abs() / 20_000.0;
        assert!(error < 0.05, "{} rows estimated", progress.rows);
        // Each fifth of the file has its share of the sample.
        for fifth in 0..5 {
            let share = seen.iter().filter(|id| **id / 4000 == fifth).count();
            assert!((200..800).contains(&share), "{share} rows of the {fifth}. fifth");
        }
    }

    #[test]
    fn of_a_directory_the_train_split_is_taken() {
        let files: [(&str, &[u8]); 5] = [
            ("data/train-0.jsonl", b"{\"id\": 1}\n"),
            ("data/test-0.jsonl", b"{\"id\": 2}\n"),
            ("dataset_infos.json", b"{}"),
            ("README.md", b"# x"),
            (".git/train.json", b"{}"),
        ];
        let directory = directory(&files);
        let found = data_files(directory.path()).unwrap();
        assert_eq!(found, [directory.path().join("data/train-0.jsonl")]);
        assert!(matches!(data_files(&directory.path().join("README.md")), Err(DataError::NoData { .. })));
    }

    #[test]
    fn what_is_damaged_is_named() {
        let files: [(&str, &[u8]); 4] = [
            ("d.json", b"{\n  \"id\": oops\n}\n"),
            ("a.parquet", b"no parquet"),
            ("b.json", b"[{\"id\": 1}, {\"id\""),
            ("c.jsonl", b"{\"id\": 1}\n{oops\n"),
        ];
        let directory = directory(&files);
        let open = |name: &str| DataFiles::open(&[directory.path().join(name)]);
        assert!(open("d.json").unwrap_err().to_string().contains("line at byte 0 is no JSON"));
        assert!(open("a.parquet").unwrap_err().to_string().contains("a.parquet"));
        assert!(open("b.json").unwrap_err().to_string().contains("EOF"));
        let errors = unreadable(&open("c.jsonl").unwrap()).unwrap();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("c.jsonl: the line at byte 10 is no JSON"), "{errors:?}");
    }

    /// Reads everything, and returns what is said about the rows that the trainer would stop at.
    fn unreadable(files: &DataFiles) -> Result<Vec<String>, DataError> {
        let errors = Mutex::new(Vec::new());
        files.read(2, &|row| {
            errors.lock().unwrap().extend(row.err());
            ControlFlow::Continue(())
        })?;
        Ok(errors.into_inner().unwrap())
    }

    #[test]
    fn a_file_that_ends_too_early_says_so_and_guesses_no_rows() {
        let list = format!("[{}]", lines(1000).trim_end().replace('\n', ", "));
        let cells: String = (0..1000).map(|id| format!("{id},\"some text\"\n")).collect();
        let csv = format!("id,text\n{cells}");
        // A list in the middle of a row; a table in the middle of a quoted cell.
        let files: [(&str, &[u8]); 2] = [
            ("cut.json", &list.as_bytes()[..list.len() - 40]),
            ("cut.csv", &csv.as_bytes()[..csv.len() - 4]),
        ];
        let directory = directory(&files);
        for (name, what) in [("cut.json", "EOF"), ("cut.csv", "a quoted cell has no end")] {
            // The first rows are sound, so their columns are known.
            let files = DataFiles::open(&[directory.path().join(name)]).unwrap();
            let error = unreadable(&files).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_damaged_row_group_is_an_error_and_no_rows() {
        let mut file = parquet_file(&[300, 300], Compression::SNAPPY);
        let middle = file.len() / 2;
        file[middle - 600..middle].fill(0xff);
        let directory = directory(&[("a.parquet", &file)]);
        let error =
            DataFiles::open(&[directory.path().join("a.parquet")]).and_then(|files| unreadable(&files));
        assert!(error.unwrap_err().to_string().contains("a.parquet"));
    }

    #[test]
    fn rows_at_which_the_trainer_stops_are_told_from_the_others() {
        let rows: [(&str, &[u8], usize); 9] = [
            ("text.csv", b"id,text\n1,ok\n2,\xff\xfe\n3,ok\n4,\xff\n", 2),
            ("more.csv", b"id,text\n1,ok\n2,ok,more\n3\n", 1),
            ("index.csv", b"id,text\n1,ok,more\n2,ok,more\n", 0),
            ("a.jsonl", b"\xef\xbb\xbf{\"id\": 1}\n3\n{\"id\": 2}\n[1]\nnull\n", 2),
            (
                "twice.jsonl",
                b"{\"id\": 1}\n{\"id\": 1, \"id\": 2}\n{\"id\": 3}{\"a\": [{\"b\": 1, \"b\": 1}]}\n",
                2,
            ),
            ("cut.jsonl", b"{\"id\": 1}\n{\"id\": [\n{\"id\": 1}\n{\"id\": {\"a\"", 2),
            ("behind.jsonl", b"{\"id\": 1}\n{\"id\": 2}, {\"id\": 3}\n{\"id\": 4} oops\n", 2),
            ("null.jsonl", b"null\n{\"id\": 1}\nnull\n", 1),
            ("a.txt", b"one\n\xff\xfe\ntwo\n", 1),
        ];
        for (name, content, expected) in rows {
            let directory = directory(&[(name, content)]);
            let files = DataFiles::open(&[directory.path().join(name)]).unwrap();
            let errors = unreadable(&files).unwrap();
            assert_eq!(errors.len(), expected, "{name}: {errors:?}");
            assert!(errors.iter().all(|error| error.contains(name)), "{errors:?}");
        }
    }

    /// Each of these was loaded by ms-swift 4.6.0 and 3.12.6, with as many rows.
    #[test]
    fn objects_are_rows_however_they_are_spread_over_lines() {
        let object = "{\n  \"id\": 1,\n\n  \"text\": \"NaN }{ \\\" \\\\\"\n}\n";
        let file = |text: &str| text.replace("ONE", "{\"id\": 1, \"text\": \"a\"}");
        let files = [
            ("two.jsonl", file("ONE\nONEONE\nONE\n"), 4),
            ("blank.jsonl", file("ONE ONE\t ONE"), 3),
            ("first.json", file("ONEONEONE\nONE\n"), 4),
            ("pretty.jsonl", object.repeat(3), 3),
            ("pretty.json", file(&format!("{object}ONE\nONE{object}")), 4),
            ("one.json", object.to_owned(), 1),
            ("one_line.json", file("ONE"), 1),
        ];
        for (name, text, expected) in files {
            let directory = directory(&[(name, text.as_bytes())]);
            let files = DataFiles::open(&[directory.path().join(name)]).unwrap();
            assert_eq!(files.columns().collect::<Vec<_>>(), ["id", "text"], "{name}");
            let (seen, progress) = ids(&files, 2, usize::MAX);
            assert_eq!(
                (seen.len(), progress.rows, progress.rows_known),
                (expected, expected as u64, true),
                "{name}"
            );
        }
        // ms-swift reads the first of these too; here it is not looked at, and nobody says that the trainer will stop.
        let late = file(&format!("ONE\n{object}ONE\n"));
        let long = object.repeat(usize::try_from(SPREAD_BYTES_MAX).unwrap() / object.len() + 1);
        for (name, text, what) in
            [("late.jsonl", late, "spread over lines, behind"), ("long.jsonl", long, "above 320 KiB")]
        {
            let directory = directory(&[(name, text.as_bytes())]);
            let files = DataFiles::open(&[directory.path().join(name)]);
            let error = files.and_then(|files| unreadable(&files)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(what), "{error}");
        }
    }

    #[test]
    fn numbers_that_json_has_no_word_for_are_no_damage() {
        let rows = "{\"id\": 1, \"a\": NaN}\n{\"id\": 2, \"a\": [-Infinity,Infinity, -NaN]}\n{\"id\": 3, \"a\": \"NaN\"}\n";
        let list = format!("[{}]", rows.trim_end().replace('\n', ","));
        for (name, text) in
            [("a.jsonl", rows), ("a.json", &list), ("pretty.json", &rows.replace(", ", ",\n"))]
        {
            let directory = directory(&[(name, text.as_bytes())]);
            let files = DataFiles::open(&[directory.path().join(name)]).unwrap();
            let seen = Mutex::new(Vec::new());
            files
                .read(1, &|row| {
                    seen.lock().unwrap().push(row.unwrap());
                    ControlFlow::Continue(())
                })
                .unwrap();
            let expected = serde_json::json!([
                {"id": 1, "a": null}, {"id": 2, "a": [null, null, null]}, {"id": 3, "a": "NaN"}]);
            assert_eq!(Value::from(seen.into_inner().unwrap()), expected, "{name}");
        }
        let directory =
            directory(&[("b.jsonl", b"{\"id\": 1}\n{\"id\": Nan}\n{\"id\": -}\n{\"id\": Infinity}Infin\n")]);
        let files = DataFiles::open(&[directory.path().join("b.jsonl")]).unwrap();
        assert_eq!(unreadable(&files).unwrap().len(), 3);
    }

    #[test]
    fn words_are_found_wherever_a_read_ends() {
        struct ByteByByte<'a>(&'a [u8]);
        impl Read for ByteByByte<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(&mut buffer[..1])
            }
        }
        let text = br#"{"NaN": NaN, "a\\": -Infinity, "b\"": "Infinity", "c": -1, "d": -Inf, "e": Info, "f": -Infin"#;
        let mut words = Vec::new();
        WithoutNan::new(ByteByByte(text)).read_to_end(&mut words).unwrap();
        let expected =
            br#"{"NaN": null, "a\\": null, "b\"": "Infinity", "c": -1, "d": null, "e": nullo, "f": -Infin"#;
        assert_eq!(String::from_utf8_lossy(&words), String::from_utf8_lossy(expected));
    }

    #[test]
    fn any_beginning_of_the_order_is_spread_evenly() {
        for count in [1, 2, 3, 10, 97, 1000, 4096] {
            let order = spread(count);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            if count >= 97 {
                let tenth = &order[..count / 10];
                let low = tenth.iter().filter(|index| **index < count / 2).count();
                assert!(
                    (low * 2).abs_diff(tenth.len()) <= tenth.len() / 3,
                    "{count}: {low} of {}",
                    tenth.len()
                );
            }
        }
    }
}
