//! How did training go on, in numbers over time?
//!
//! At most [`SAMPLES_KEPT`] samples of an attempt are kept. When there are more, all but every second (then fourth,
//! eighth, ...) are dropped, counted from the first; the first and the last stay. So the distance between those that
//! are left is even, but for the newest, which are all there until the next time; and the curve keeps its shape,
//! though not each of its spikes.

use rusqlite::{Connection, params};

use crate::error::StoreError;
use crate::job::JobId;

/// Samples of one attempt that are kept at most.
pub const SAMPLES_KEPT: usize = 2_000;

/// One point of the curves.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// When, Unix time in milliseconds.
    pub at_ms: i64,
    /// Optimizer steps done.
    pub step: u64,
    /// Training loss. NaN is not a number that SQLite has: it comes back as `None`.
    pub loss: Option<f64>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Norm of the gradients before clipping; NaN as for `loss`.
    pub grad_norm: Option<f64>,
    /// Memory of the card that the attempt holds.
    pub vram_bytes: Option<u64>,
}

/// A sample, and the attempt it belongs to.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct SampleOf {
    /// Number of the attempt.
    pub attempt: u32,
    /// The sample.
    pub sample: Sample,
}

/// Appends samples of a job that exists, and thins them out when they are too many.
pub(crate) fn note(
    connection: &Connection,
    id: JobId,
    attempt: u32,
    samples: &[Sample],
) -> Result<(), StoreError> {
    let mut last: i64 = connection
        .prepare_cached("SELECT coalesce(max(number), 0) FROM samples WHERE job_id = ?1 AND attempt = ?2")?
        .query_row(params![id, attempt], |row| row.get(0))?;
    let mut insert = connection.prepare_cached(
        "INSERT INTO samples (job_id, attempt, number, at_ms, step, loss, learning_rate, grad_norm, vram_bytes) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?;
    for sample in samples {
        last += 1;
        let Sample { at_ms, step, loss, learning_rate, grad_norm, vram_bytes } = *sample;
        insert.execute(params![
            id,
            attempt,
            last,
            at_ms,
            step,
            loss,
            learning_rate,
            grad_norm,
            vram_bytes
        ])?;
    }
    thin_out(connection, id, attempt, last)
}

fn thin_out(connection: &Connection, id: JobId, attempt: u32, last: i64) -> Result<(), StoreError> {
    let kept: i64 = connection
        .prepare_cached("SELECT count(*) FROM samples WHERE job_id = ?1 AND attempt = ?2")?
        .query_row(params![id, attempt], |row| row.get(0))?;
    if usize::try_from(kept).is_ok_and(|kept| kept <= SAMPLES_KEPT) {
        return Ok(());
    }
    connection
        .prepare_cached(
            "DELETE FROM samples WHERE job_id = ?1 AND attempt = ?2 AND (number - 1) % ?3 <> 0 AND number <> ?4",
        )?
        .execute(params![id, attempt, stride(last), last])?;
    Ok(())
}

/// Returns the smallest power of two that leaves at most three quarters of the room to `last` samples: so thinning is
/// rare, and what it leaves is a part of what it left before.
fn stride(last: i64) -> i64 {
    let room = i64::try_from(SAMPLES_KEPT / 4 * 3).unwrap_or(1);
    let mut stride = 1;
    while last / stride > room {
        stride *= 2;
    }
    stride
}

/// Returns the samples of one attempt or of all, in the order in which they were noted.
pub(crate) fn series(
    connection: &Connection,
    id: JobId,
    attempt: Option<u32>,
) -> Result<Vec<SampleOf>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT attempt, at_ms, step, loss, learning_rate, grad_norm, vram_bytes FROM samples \
         WHERE job_id = ?1 AND attempt BETWEEN ?2 AND ?3 ORDER BY attempt, number",
    )?;
    let (from, to) = attempt.map_or((0, u32::MAX), |attempt| (attempt, attempt));
    let rows = statement.query_map(params![id, from, to], |row| {
        let sample = Sample {
            at_ms: row.get(1)?,
            step: row.get(2)?,
            loss: row.get(3)?,
            learning_rate: row.get(4)?,
            grad_norm: row.get(5)?,
            vram_bytes: row.get(6)?,
        };
        Ok(SampleOf { attempt: row.get(0)?, sample })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
