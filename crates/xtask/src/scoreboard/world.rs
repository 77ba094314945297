//! What do the contestants' trainers run on? A simulated card, and a neighbour on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nvml_sim::{SimDevice, SimFile, SimProcess};

use super::cases::{Case, Kind, NEIGHBOUR_S, RESIDENT_BYTES, TOKEN_BYTES};
use super::witness::History;

const CARD: &str = "GPU-00000000-0000-4000-8000-000000000001";

/// The neighbour's process. It need not exist.
const NEIGHBOUR_PID: u32 = 4_194_000;

/// The card of one case, for one contestant.
#[derive(Debug)]
pub(super) struct World {
    case: Case,
    dir: PathBuf,
    neighbour: Neighbour,
    /// How much of the witness's file was there at the last look.
    seen: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Neighbour {
    /// Comes when the step before the case's is done.
    Awaited,
    Here(Instant),
    Gone,
}

impl World {
    pub(super) fn make(case: Case, dir: &Path) -> anyhow::Result<World> {
        fs::create_dir_all(dir.join("usage"))?;
        let neighbour = if case.kind == Kind::Neighbour { Neighbour::Awaited } else { Neighbour::Gone };
        let world = World { case, dir: dir.to_owned(), neighbour, seen: 0 };
        world.neighbour_holds(0)?;
        Ok(world)
    }

    /// Returns the file in which the witnesses write.
    pub(super) fn witness(&self) -> PathBuf {
        self.dir.join("order.jsonl")
    }

    /// Returns what the trainers, and mhtraind, find in their environment.
    pub(super) fn variables(&self) -> Vec<(&'static str, String)> {
        let text = |path: PathBuf| path.display().to_string();
        let mut variables = vec![
            ("ORDER_LOG", text(self.witness())),
            ("MHT_SIM_CAPACITY_BYTES", self.case.card_bytes().to_string()),
            ("MHT_SIM_BYTES_PER_TOKEN", TOKEN_BYTES.to_string()),
            ("MHT_SIM_RESIDENT_BYTES", RESIDENT_BYTES.to_string()),
            ("MHT_SIM_OTHERS_FILE", text(self.dir.join("others"))),
            ("MHT_SIM_DEVICE_UUID", CARD.to_owned()),
            ("NVML_SIM_FILE", text(self.dir.join("nvml.json"))),
            ("NVML_SIM_USAGE", text(self.dir.join("usage"))),
        ];
        if self.case.kind == Kind::Growth {
            variables.push(("MHT_SIM_GROWTH_BYTES", self.case.lacking_bytes().to_string()));
            variables.push(("MHT_SIM_GROWTH_STEP", self.case.step.to_string()));
        }
        variables
    }

    /// Lets the neighbour come and go. To be called every few milliseconds while a trainer runs.
    pub(super) fn look(&mut self) -> anyhow::Result<()> {
        match self.neighbour {
            Neighbour::Gone => Ok(()),
            Neighbour::Here(since) if since.elapsed() < Duration::from_secs(NEIGHBOUR_S) => Ok(()),
            Neighbour::Here(_) => {
                self.neighbour = Neighbour::Gone;
                self.neighbour_holds(0)
            }
            Neighbour::Awaited => {
                let length = fs::metadata(self.witness()).map_or(0, |file| file.len());
                if length == self.seen {
                    return Ok(());
                }
                self.seen = length;
                let history = History::read(&fs::read_to_string(self.witness())?)?;
                if history.newest_step + 1 < self.case.step {
                    return Ok(());
                }
                self.neighbour = Neighbour::Here(Instant::now());
                self.neighbour_holds(self.case.lacking_bytes())
            }
        }
    }

    /// Writes what the neighbour holds where NVML and the simulated capacity read it.
    fn neighbour_holds(&self, bytes: u64) -> anyhow::Result<()> {
        let mut card = SimDevice::idle(CARD, "Simulated GPU", self.case.card_bytes(), "8.6");
        card.used = bytes;
        if bytes > 0 {
            card.processes.push(SimProcess { pid: NEIGHBOUR_PID, used: Some(bytes) });
        }
        SimFile::new(vec![card]).write_atomically(&self.dir.join("nvml.json"))?;
        // Renamed over the old one: a pass never reads half a number.
        let fresh = self.dir.join("others.new");
        fs::write(&fresh, bytes.to_string())?;
        fs::rename(&fresh, self.dir.join("others"))?;
        Ok(())
    }
}
