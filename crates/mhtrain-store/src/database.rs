//! How is the database opened, and when is a write certain?
//!
//! Write-ahead log with `synchronous=FULL`: a commit returns after the log is synced, by fdatasync. Opening after a crash
//! reads the log again; a transaction is in it as a whole or not at all. Everything SQLite says comes out of here
//! as a [`StoreError`] that says what it means.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mhtrain_failpoint::reach;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::directory::StateDirectory;
use crate::error::StoreError;

/// The schema, one file per version; the database's `user_version` says how many of them it has had.
const SCHEMA: [&str; 2] =
    [include_str!("../schema/0001_jobs.sql"), include_str!("../schema/0002_observations.sql")];

/// The version of the schema that this program writes.
pub(crate) const SCHEMA_VERSION: usize = SCHEMA.len();

/// How long a write waits for another program, such as the `sqlite3` shell.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Frames of the log after which it is copied into the database: what SQLite itself would take.
const LOG_FRAMES_MAX: u32 = 1000;

/// Statements that are kept compiled: more than this crate has.
const STATEMENTS_KEPT: usize = 64;

/// What a committed transaction survives.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// A power cut.
    PowerCut,
    /// The end of this process, but a power cut only once a later transaction does.
    ProcessEnd,
}

/// The open database.
#[derive(Debug)]
pub(crate) struct Database {
    // Closed before the lock is given back, because fields are dropped in this order.
    connection: Connection,
    directory: StateDirectory,
    path: PathBuf,
    /// Whether an fsync of the log has failed since it was last begun anew.
    distrusts_log: bool,
    /// Frames that were written to the log since all of it was copied into the database.
    frames: u32,
    /// What keeps it from being written; `None` since that worked.
    trouble: Option<String>,
}

impl Database {
    /// Opens the database in `directory`, or makes it.
    pub(crate) fn open(mut directory: StateDirectory) -> Result<Database, StoreError> {
        let path = directory.database();
        // Closing removes the log, so one that is left tells of a crash.
        let crashed = directory.has_log();
        // Not SQLITE_OPEN_CREATE: the file is there, with its mode.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        let mut connection = Connection::open_with_flags(&path, flags)
            .map_err(|error| StoreError::from(error).explain(&path, None))?;
        prepare(&mut connection, &path)
            .and_then(|()| if crashed { check_listing(&connection, &path) } else { Ok(()) })
            .map_err(|error| error.explain(&path, system_errno(&connection)))?;
        directory.hold_database()?;
        let mut database =
            Database { connection, directory, path, distrusts_log: crashed, frames: 0, trouble: None };
        if crashed {
            // Whoever died may have distrusted it. Where it cannot be begun anew now, the first write does it, or fails.
            database.copy_log("TRUNCATE");
        }
        Ok(database)
    }

    /// Returns what `work` reads.
    pub(crate) fn read<T>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        work(&self.connection).map_err(|error| self.explain(error))
    }

    /// Does `work` in one transaction. `Ok` means that it is committed, to the files that are at their paths.
    ///
    /// After an error it is rolled back, or the files are gone. Only an error of the very fsync leaves open whether
    /// it is on disk: until the next write, which begins the log anew, a crash may bring it back.
    pub(crate) fn write<T>(
        &mut self,
        durability: Durability,
        work: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let done = self.try_to_write(durability, work);
        match &done {
            Err(error) if error.is_temporary() => self.trouble = Some(chain(error)),
            // What needs no fsync says nothing about whether one works.
            Ok(_) if durability == Durability::PowerCut => self.trouble = None,
            Ok(_) | Err(_) => {}
        }
        done
    }

    /// Returns what keeps the database from being written; `None` when the last write worked.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    fn try_to_write<T>(
        &mut self,
        durability: Durability,
        work: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.directory.check_in_place()?;
        self.begin_log_anew()?;
        let done = transaction(&mut self.connection, durability, work);
        self.distrusts_log = done.as_ref().is_err_and(is_failed_sync);
        let done = done.map_err(|error| self.explain(error))?;
        // Again, because it is the commit that must have gone to the right files.
        self.directory.check_in_place()?;
        self.frames = self.frames.saturating_add(frames_written(&self.connection));
        if self.frames >= LOG_FRAMES_MAX {
            self.copy_log("PASSIVE");
        }
        Ok(done)
    }

    /// Copies the log into the database as far as nobody reads from it. What is committed stays so whatever comes of that.
    ///
    /// SQLite would do it by itself after a commit, but keep the error of an fsync to itself (`sqlite3WalDefaultHook` drops it):
    /// the next commit would then trust a log whose frames may not be on disk. Here it begins the log anew.
    fn copy_log(&mut self, mode: &str) {
        let copied = self.connection.query_row(&format!("PRAGMA wal_checkpoint({mode})"), (), |row| {
            let (busy, frames, copied): (bool, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(!busy && frames == copied)
        });
        match copied.map_err(StoreError::from) {
            Ok(true) => (self.distrusts_log, self.frames) = (false, 0),
            // Somebody reads from it: again after the next write.
            Ok(false) => {}
            // A full disk, for one, takes nothing away from the log.
            Err(error) => self.distrusts_log |= is_failed_sync(&error),
        }
    }

    /// Begins the log anew where it cannot be trusted: copies what is committed into the database, syncs that, and cuts the log.
    ///
    /// After a failed fsync the kernel takes the pages for written (since Linux 4.13 it tells of a failure once), so the next one
    /// says nothing about what was in the log before: later transactions would stand behind frames that a power cut leaves
    /// torn, and go with them. Also the transaction that was refused is still in the log, whole, until something takes its
    /// place. The copy is written again as often as its own fsync fails.
    fn begin_log_anew(&mut self) -> Result<(), StoreError> {
        if !self.distrusts_log {
            return Ok(());
        }
        let checkpoint = || -> Result<bool, StoreError> {
            if !self.connection.is_autocommit() {
                self.connection.execute_batch("ROLLBACK")?;
            }
            Ok(self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |row| row.get(0))?)
        };
        if checkpoint().map_err(|error| self.explain(error))? {
            return Err(StoreError::Locked { path: self.path.clone() });
        }
        (self.distrusts_log, self.frames) = (false, 0);
        Ok(())
    }

    /// Returns the error of a database that contradicts itself.
    pub(crate) fn damaged(&self, detail: String) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), detail }
    }

    fn explain(&self, error: StoreError) -> StoreError {
        error.explain(&self.path, system_errno(&self.connection))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Closing copies the log into the database and removes it *by its path*. With other files at the paths, that
        // log would belong to somebody else's database.
        if self.directory.check_in_place().is_err() {
            let _ = self.connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
        }
    }
}

/// Returns an error with its causes in one line.
fn chain(error: &StoreError) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Returns whether this is the error of an fsync.
fn is_failed_sync(error: &StoreError) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_DIR_FSYNC, SQLITE_IOERR_FSYNC};
    let StoreError::Sql(error) = error else { return false };
    let code = error.sqlite_error().map(|error| error.extended_code);
    matches!(code, Some(SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC))
}

fn prepare(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // `Database::copy_log` does it, and sees what goes wrong.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    let found: i64 = connection.query_row("PRAGMA user_version", (), |row| row.get(0))?;
    let version = usize::try_from(found).unwrap_or(usize::MAX);
    if version > SCHEMA_VERSION {
        let found = u32::try_from(found).unwrap_or(u32::MAX);
        return Err(StoreError::TooNew { path: path.to_owned(), found });
    }
    if version == 0 && has_tables(connection)? {
        return Err(StoreError::NotAStore { path: path.to_owned() });
    }
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", (), |row| row.get(0))?;
    if mode != "wal" {
        let detail = format!("SQLite keeps it in journal mode {mode}, not wal");
        return Err(StoreError::Damaged { path: path.to_owned(), detail });
    }
    for (missing, sql) in SCHEMA.iter().enumerate().skip(version) {
        transaction(connection, Durability::PowerCut, |connection| {
            connection.execute_batch(sql)?;
            Ok(connection.pragma_update(None, "user_version", missing + 1)?)
        })?;
    }
    Ok(())
}

/// Looks at the table that listings read, and at its indexes; for use after a crash.
///
/// Not at all of the database: with 10,000 finished jobs of 11 events (50 MB) `quick_check` takes 30 ms, but 430 to
/// 580 ms when the file is not in the page cache, and after a power cut it is not. This takes 2 ms, or 21 ms then.
/// The events of jobs that are not over are read and folded when the store is opened, all others when asked for.
fn check_listing(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let detail: String = connection.query_row("PRAGMA quick_check (jobs)", (), |row| row.get(0))?;
    if detail == "ok" {
        return Ok(());
    }
    Err(StoreError::Damaged { path: path.to_owned(), detail })
}

fn has_tables(connection: &Connection) -> Result<bool, StoreError> {
    Ok(connection.query_row("SELECT EXISTS (SELECT 1 FROM sqlite_schema)", (), |row| row.get(0))?)
}

fn transaction<T>(
    connection: &mut Connection,
    durability: Durability,
    work: impl FnOnce(&Connection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    // A rollback can fail as well, on the same broken disk. What it left open must not swallow this transaction.
    if !connection.is_autocommit() {
        connection.execute_batch("ROLLBACK")?;
    }
    // Said each time, so that no transaction depends on what the one before wanted.
    connection.execute_batch(match durability {
        Durability::PowerCut => "PRAGMA synchronous = FULL",
        Durability::ProcessEnd => "PRAGMA synchronous = NORMAL",
    })?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let done = work(&transaction)?;
    let kind = match durability {
        Durability::PowerCut => "event",
        Durability::ProcessEnd => "note",
    };
    reach("store.before_commit", kind);
    transaction.commit()?;
    Ok(done)
}

/// Returns how many frames this connection wrote to the log since it was asked last.
fn frames_written(connection: &Connection) -> u32 {
    use rusqlite::ffi::{SQLITE_DBSTATUS_CACHE_WRITE, sqlite3_db_status};
    let (mut written, mut highest) = (0, 0);
    // SAFETY: as in `system_errno`; it writes to the two numbers and resets a counter of the connection. Its one error is an
    // operation that it does not know, and then nothing was counted.
    let _never = unsafe {
        sqlite3_db_status(
            connection.handle(),
            SQLITE_DBSTATUS_CACHE_WRITE,
            &raw mut written,
            &raw mut highest,
            1,
        )
    };
    u32::try_from(written).unwrap_or(0)
}

/// Returns the number of the operating system's error behind SQLite's last one; `None` when there is none.
fn system_errno(connection: &Connection) -> Option<i32> {
    // SAFETY: `handle` is that of an open connection, because `connection` is borrowed, and this thread has it alone,
    // because `Connection` is not `Sync`. The function only reads a field of it.
    let errno = unsafe { rusqlite::ffi::sqlite3_system_errno(connection.handle()) };
    (errno != 0).then_some(errno)
}

#[cfg(test)]
impl Database {
    /// Returns the connection, for tests that look behind the store.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Does as if an fsync of the log had failed.
    pub(crate) fn distrust_log(&mut self) {
        self.distrusts_log = true;
    }
}
