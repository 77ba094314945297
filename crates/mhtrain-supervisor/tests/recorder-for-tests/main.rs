//! The hidden subcommands of mhtraind, and nothing else: `recorder DIR` and `recorder-adopt DIR`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let status = match arguments.as_slice() {
        [verb, dir] if verb == mhtrain_supervisor::recorder::RECORDER_VERB => {
            mhtrain_supervisor::recorder::recorder_main(Path::new(dir))
        }
        [verb, dir] if verb == mhtrain_supervisor::adopt::ADOPT_VERB => {
            mhtrain_supervisor::adopt::adopt_main(Path::new(dir))
        }
        _ => 2,
    };
    ExitCode::from(u8::try_from(status).unwrap_or(1))
}
