-- Version 2: what attempts showed about memory, for the predictions of later ones.
--
-- Without REFERENCES: an observation outlives its job.
CREATE TABLE observations (
    -- The newest has the largest.
    id          INTEGER PRIMARY KEY,
    job_id      INTEGER NOT NULL,
    attempt     INTEGER NOT NULL,
    owner_uid   INTEGER NOT NULL,
    -- JSON of mhtrain_sizing::observation::Observation.
    observation TEXT    NOT NULL,
    UNIQUE (job_id, attempt)
) STRICT;
