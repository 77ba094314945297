//! What did earlier attempts show about memory?
//!
//! The newest [`OBSERVATIONS_KEPT`] are kept, also those of jobs that were removed.

pub use mhtrain_sizing::known::{OBSERVATIONS_KEPT, ObservationOf};
use rusqlite::{Connection, params};

use crate::error::StoreError;
use crate::job::JobId;

/// Notes an observation; a second one of the same attempt takes the place of the first.
pub(crate) fn note(
    connection: &Connection,
    id: JobId,
    attempt: u32,
    noted: &ObservationOf,
) -> Result<(), StoreError> {
    let text = serde_json::to_string(&noted.observation)
        .map_err(|error| StoreError::Sql(rusqlite::Error::ToSqlConversionFailure(error.into())))?;
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO observations (job_id, attempt, owner_uid, observation) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![id, attempt, noted.owner_uid, text])?;
    connection
        .prepare_cached("DELETE FROM observations WHERE id <= (SELECT max(id) FROM observations) - ?1")?
        .execute([OBSERVATIONS_KEPT])?;
    Ok(())
}

/// Returns all of them, oldest first. One that this version cannot read says nothing.
pub(crate) fn all(connection: &Connection) -> Result<Vec<ObservationOf>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT owner_uid, observation FROM observations ORDER BY id")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)))?;
    let mut found = Vec::new();
    for row in rows {
        let (owner_uid, text) = row?;
        if let Ok(observation) = serde_json::from_str(&text) {
            found.push(ObservationOf { owner_uid, observation });
        }
    }
    Ok(found)
}
