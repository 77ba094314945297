-- What is on disk about jobs, version 1 (PRAGMA user_version).
--
-- A change of the schema is a further file with the next number; this one stays as it is, because databases made
-- by it are out there. Times are RFC 3339 text, as in the records. STRICT: SQLite keeps the types as declared.

-- One row per job: who it belongs to, and a summary of its events for listings. The summary is never the truth;
-- it is what the fold of the events said when the last of them was appended.
CREATE TABLE jobs (
    -- AUTOINCREMENT: the number of a removed job is never given to another one.
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    owner_uid    INTEGER NOT NULL,
    owner_gid    INTEGER NOT NULL,
    owner_name   TEXT    NOT NULL,
    -- What makes a repeated submission the same one; unique among the jobs of an owner.
    key          TEXT,
    name         TEXT    NOT NULL,
    -- Which of several queued jobs goes first; what the number means is up to the scheduler.
    priority     INTEGER NOT NULL,
    -- The device that the job asks for, later the one that it got.
    device       TEXT,
    submitted_at TEXT    NOT NULL,
    -- From here on: the fold.
    updated_at   TEXT    NOT NULL,
    state        TEXT    NOT NULL,
    reason       TEXT,
    attempts     INTEGER NOT NULL,
    is_final     INTEGER NOT NULL CHECK (is_final IN (0, 1))
) STRICT;

CREATE UNIQUE INDEX jobs_by_key ON jobs (owner_uid, key) WHERE key IS NOT NULL;
CREATE INDEX jobs_by_owner ON jobs (owner_uid, id);
CREATE INDEX jobs_by_state ON jobs (state, id);
-- Opening reads the few that are not over, however many are.
CREATE INDEX jobs_unfinished ON jobs (id) WHERE is_final = 0;

-- What happened, in order. The first event of a job is `submitted` and holds its spec.
CREATE TABLE events (
    -- A plain rowid: new events go to the end of the table, so appending does not slow down with age.
    id     INTEGER PRIMARY KEY,
    job_id INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    -- Counted from 1 within the job, without gaps.
    number INTEGER NOT NULL,
    -- A line of the journal (`Record::to_line`) without its line break. It carries its own version.
    record TEXT    NOT NULL,
    UNIQUE (job_id, number)
) STRICT;

-- Where and how the submitter wanted the job run: working directory, umask, environment. JSON, opaque here. Apart
-- from `jobs`, because SQLite rewrites a row as a whole and this is the big part that never changes.
CREATE TABLE contexts (
    job_id  INTEGER PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    context TEXT NOT NULL
) STRICT;

-- How training went on, thinned out. The last seconds may be missing after a power cut.
CREATE TABLE samples (
    job_id        INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt       INTEGER NOT NULL,
    -- Counted from 1 within the attempt, thinned samples included.
    number        INTEGER NOT NULL,
    -- Unix time in milliseconds.
    at_ms         INTEGER NOT NULL,
    step          INTEGER NOT NULL,
    loss          REAL,
    learning_rate REAL,
    grad_norm     REAL,
    vram_bytes    INTEGER,
    PRIMARY KEY (job_id, attempt, number)
) STRICT, WITHOUT ROWID;

-- What the daemon must remember about itself, such as `drained`.
CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
