//! `mhtraind man-pages`: the manual, one page a command, from the same definition as `--help`.
//!
//! The text after a command's options is its notes and its examples. They become sections of their own, in which
//! examples keep their line breaks.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::Cli;
use crate::failure::{Failure, Status, unwritable};

/// Write the manual, a page a command, into a directory
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  mhtraind man-pages ~/.local/share/man/man1 && man mhtraind-submit

The Debian package has them in place already.")]
pub struct ManPagesArgs {
    /// The directory; it is made if it is missing
    dir: PathBuf,
}

/// Runs the command.
pub fn run(args: &ManPagesArgs) -> Result<Status, Failure> {
    std::fs::create_dir_all(&args.dir).map_err(|e| unwritable(&args.dir, &e))?;
    // The `help` command would have a page for every other command.
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    for command in std::iter::once(&root).chain(root.get_subcommands()) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name());
        let path = args.dir.join(format!("{name}.1"));
        std::fs::write(&path, page(command)).map_err(|e| unwritable(&path, &e))?;
    }
    Ok(Status::Done)
}

/// Returns the page of one command.
fn page(command: &clap::Command) -> Vec<u8> {
    let man = Man::new(command.clone()).source(concat!("mhtraind ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    let mut render = || {
        man.render_title(&mut page)?;
        man.render_name_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
        if command.has_subcommands() {
            man.render_subcommands_section(&mut page)?;
        }
        after_the_options(command).to_writer(&mut page)
    };
    render().expect("a vector takes every byte");
    page
}

/// Returns what follows the options: paragraphs as notes, examples as they are typed.
fn after_the_options(command: &clap::Command) -> Roff {
    let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (mut notes, mut examples) = (Vec::new(), Vec::new());
    for paragraph in text.split("\n\n") {
        match paragraph.split_once('\n') {
            Some(("Example:" | "Examples:", typed)) => examples.extend(typed.lines()),
            _ => notes.push(paragraph),
        }
    }
    let mut roff = Roff::default();
    if !notes.is_empty() {
        roff.control("SH", ["NOTES"]);
        for note in notes {
            roff.control("PP", []);
            roff.text([roman(note)]);
        }
    }
    if !examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        roff.control("nf", []);
        for line in examples {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    roff
}
