#[path = "../src/score_memory.rs"]
mod score_memory;
use clap::Parser;
#[derive(Parser)]
struct A { #[command(flatten)] a: score_memory::Args }
fn main() -> anyhow::Result<()> { score_memory::run(&A::parse().a) }
