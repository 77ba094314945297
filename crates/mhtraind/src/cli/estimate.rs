//! `mhtraind estimate`: how much memory will these workloads need?

use std::collections::HashMap;
use std::io::{BufRead, Read};
use std::path::PathBuf;

use clap::Args;
use mhtrain_sizing::estimate::Estimate;
use mhtrain_sizing::estimate_request::{Answer, ConfigRef, EstimateRequest, EstimateRequestError};
use serde_json::Value;

use super::output;
use crate::failure::{Failure, Status, unreadable};

/// Predict the peak memory of workloads given as JSON lines; nothing is started
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  echo '{\"config\": \"Qwen2.5-7B/config.json\", \"train_type\": \"lora\", \"micro_batch\": 8, \"accumulation\": 4,
         \"max_length\": 3072, \"packing\": true, \"attn_impl\": \"flash_attn\"}' | tr -d '\\n' | mhtraind estimate -

Keys: config (path of a config.json) or config_object, train_type, lora_rank, target_modules, torch_dtype,
micro_batch, accumulation, max_length, packing, padded, attn_impl, gradient_checkpointing, liger_kernel, logit_share,
expandable_segments (true where PYTORCH_CUDA_ALLOC_CONF has it on; false), transformers (4 or 5; 5: how experts are held),
router_loss (the load balancing loss of a mixture is on; false).
`source` and `notes` of an answer say how well the model is known.
A line that cannot be answered gives {\"error\": …} in its place, and the exit code is 2 after the last line.")]
pub struct EstimateArgs {
    /// File of JSON lines; `-` reads standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    /// One JSON object a line instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Longest line that is read. A config.json is a few KiB.
const LINE_BYTES_MAX: u64 = 10 << 20;

/// Editors on Windows put it in front of a file.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Runs the command.
pub fn run(args: &EstimateArgs) -> Result<Status, Failure> {
    let mut lines = output::open_lines(&args.file)?;
    let mut configs = Configs::default();
    let mut bad_lines = 0;
    if !args.json {
        output::line(format!(
            "{:>5} {:>12} {:>12} {:>24} {:>10} {:>10} {:>10}",
            "line", "allocated", "device", "90 % interval", "weights", "activ.", "logits"
        ))?;
    }
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let mut rest = lines.by_ref().take(LINE_BYTES_MAX + 1);
        if rest.read_until(b'\n', &mut line).map_err(|e| unreadable(&args.file, &e))? == 0 {
            break;
        }
        if line.len() as u64 > LINE_BYTES_MAX {
            return Err(Failure::bad_input(
                "too_large",
                format!(
                    "line {number} of {} is longer than {} MiB",
                    args.file.display(),
                    LINE_BYTES_MAX >> 20
                ),
            )
            .help("write one object a line; is it the right file?".to_owned()));
        }
        let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&line);
        if line.trim_ascii().is_empty() {
            continue;
        }
        match answer(line, &mut configs) {
            Ok(answer) if args.json => output::json_line(&answer)?,
            Ok(answer) => {
                output::line(row(number, &answer.estimate))?;
                for note in &answer.notes {
                    output::line(format!("{:>5} {note}", ""))?;
                }
            }
            Err(failure) => {
                bad_lines += 1;
                if args.json {
                    output::json_line(&failure.to_json())?;
                } else {
                    output::line(format!("{number:>5} {}", failure.message))?;
                }
            }
        }
    }
    Ok(if bad_lines == 0 { Status::Done } else { Status::BadInput })
}

fn answer(line: &[u8], configs: &mut Configs) -> Result<Answer, Failure> {
    let line = std::str::from_utf8(line).map_err(|e| {
        Failure::bad_input("not_utf8", format!("the line is no UTF-8 text: {e}"))
            .help("save the file as UTF-8".to_owned())
    })?;
    let failure = |error: EstimateRequestError| Failure::bad_input(error.code(), &error).help(error.help());
    let request = EstimateRequest::parse(line).map_err(failure)?;
    let loaded = match &request.config {
        ConfigRef::Path(path) => Some(configs.load(path)?),
        ConfigRef::Object(_) => None,
    };
    request.answer(loaded).map_err(failure)
}

fn row(number: usize, estimate: &Estimate) -> String {
    let terms = &estimate.terms;
    format!(
        "{number:>5} {:>12} {:>12} {:>24} {:>10} {:>10} {:>10}",
        estimate.allocated_peak_bytes,
        estimate.device_peak_bytes,
        format!("{} - {}", estimate.low_bytes, estimate.high_bytes),
        terms.weights,
        terms.activations,
        terms.logits
    )
}

/// config.json files that were read before: a batch of lines usually asks about few models.
#[derive(Default)]
struct Configs(HashMap<String, Value>);

impl Configs {
    fn load(&mut self, path: &str) -> Result<&Value, Failure> {
        if !self.0.contains_key(path) {
            let text = output::read_text(&PathBuf::from(path))?;
            let value = serde_json::from_str(&text).map_err(|e| {
                Failure::bad_input("bad_config_json", format!("{path} is no JSON: {e}"))
                    .help("name the config.json of a model".to_owned())
            })?;
            self.0.insert(path.to_owned(), value);
        }
        Ok(&self.0[path])
    }
}
