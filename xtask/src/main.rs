//! `cargo xtask`: the list of commands. Each one is a function of the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::{bench, demo, dev, ebpf, mutants, test};

/// Everything a contributor runs.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every check, as CI does; needs root.
    Test {
        /// Leave out the demonstration at the end.
        #[arg(long)]
        skip_demo: bool,
    },
    /// Show the product working in network namespaces; needs root.
    Demo {
        /// How long traffic flows.
        #[arg(long, default_value_t = 20)]
        seconds: u64,
        /// Leave it running at the end and say where the metrics are.
        #[arg(long)]
        keep: bool,
        /// Remove what an earlier --keep left, and nothing else.
        #[arg(long)]
        clean: bool,
    },
    /// Run the gateway and the service; rebuild and restart them when a source changes.
    Dev {
        /// The gateway's configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Prove that every classic bug, switched on, is caught by its named test.
    Mutants,
    /// Measure against peers, in one run; needs root and a quiet machine.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        what: bench::Bench,
    },
    /// Build the committed BPF object, or prove that it matches its sources.
    BuildEbpf {
        /// Build into a temporary directory and compare instead of replacing.
        #[arg(long)]
        check: bool,
        /// Which compiler; without it Debian's, then nightly, whichever is there.
        #[arg(long)]
        toolchain: Option<ebpf::Toolchain>,
    },
}

fn main() -> ExitCode {
    let outcome = ebpf::become_rustc_if_called_by_cargo().and_then(|()| run(Arguments::parse()));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Test { skip_demo } => test::run(skip_demo),
        Command::Demo {
            seconds,
            keep,
            clean,
        } => demo::run(demo::Options {
            seconds,
            keep,
            clean,
        }),
        Command::Dev { config } => dev::run(&config),
        Command::Mutants => mutants::run(),
        Command::Bench { what } => bench::run(&what),
        Command::BuildEbpf {
            check: true,
            toolchain,
        } => ebpf::check(toolchain),
        Command::BuildEbpf {
            check: false,
            toolchain,
        } => ebpf::build(toolchain),
    }
}
