//! Which earlier attempts are known on this machine, and whose word counts for whom?
//!
//! They correct the predictions of their own user alone: what a trainer reports and what it holds on a card are its user's to
//! choose, and must not keep others from theirs.

use crate::observation::Observation;

/// Observations that are kept at most.
pub const OBSERVATIONS_KEPT: u32 = 2_000;

/// Most runs of one user's model, method, versions, card and rung that are remembered: the spread of sixteen is known well
/// enough, and every plan of a job reads all of them.
const ALIKE_KEPT: usize = 16;

/// What one attempt showed.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservationOf {
    /// User id of the job's owner.
    pub owner_uid: u32,
    /// The observation.
    pub observation: Observation,
}

/// What is known, oldest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known(Vec<ObservationOf>);

impl Known {
    /// Adds one; of those that are alike, and of all, the oldest go.
    pub fn add(&mut self, new: ObservationOf) {
        let is_alike = |noted: &ObservationOf| {
            noted.owner_uid == new.owner_uid
                && noted.observation.fingerprint == new.observation.fingerprint
                && noted.observation.tier == new.observation.tier
        };
        let alike: Vec<usize> = (0..self.0.len()).filter(|at| is_alike(&self.0[*at])).collect();
        if alike.len() >= ALIKE_KEPT {
            self.0.remove(alike[0]);
        }
        self.0.push(new);
        let surplus = self.0.len().saturating_sub(OBSERVATIONS_KEPT as usize);
        self.0.drain(..surplus);
    }

    /// Returns what counts for a user.
    pub fn of(&self, uid: u32) -> impl Iterator<Item = &Observation> {
        self.0.iter().filter(move |noted| noted.owner_uid == uid).map(|noted| &noted.observation)
    }

    /// Returns all of them.
    pub fn all(&self) -> &[ObservationOf] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::{Fingerprint, Seen, Versions};
    use crate::reserve::Group;
    use crate::units::Bytes;
    use crate::workload::TrainType;

    fn named(owner_uid: u32, name: &str, model: &str) -> ObservationOf {
        let fingerprint = Fingerprint {
            model: model.to_owned(),
            family: "qwen2".to_owned(),
            method: TrainType::Lora,
            group: Group::Equal,
            versions: Versions::default(),
            card: "c".to_owned(),
        };
        let observation = Observation {
            name: name.to_owned(),
            fingerprint,
            tier: None,
            predicted: Bytes::from_gib(10),
            sized_row: None,
            seen: Seen::MoreThan { limit: Bytes::from_gib(20) },
            pace: None,
        };
        ObservationOf { owner_uid, observation }
    }

    #[test]
    fn of_runs_that_are_alike_the_newest_are_kept_and_those_of_others_are_not_alike() {
        let mut known = Known::default();
        known.add(named(1, "another model", "another"));
        known.add(named(2, "another user", "m"));
        for n in 1..=ALIKE_KEPT + 3 {
            known.add(named(1, &format!("run {n}"), "m"));
        }
        let names: Vec<&str> = known.of(1).map(|observation| observation.name.as_str()).collect();
        assert_eq!(names.len(), ALIKE_KEPT + 1);
        assert_eq!((names[0], names[1]), ("another model", "run 4"));
        assert_eq!(known.of(2).count(), 1);
    }
}
