//! Arguments in, exit code out.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use edgemeter::{app, config::Config, doctor, kernel, report};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Kernel-observed edge gateway: a reverse proxy that bills the bytes the wire really carried.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM (drain) or SIGINT.
    Run(ConfigArgument),
    /// Check a configuration file and say what it means.
    Check(ConfigArgument),
    /// Say what this machine can do for the gateway, and what is lost without it.
    Doctor(ConfigArgument),
    /// Print what the ledger holds, by route, with the conservation line. Works while serving.
    Report(ConfigArgument),
    /// Take the kernel programs off and drop their counters. Post them first: run until idle.
    Detach(ConfigArgument),
}

#[derive(clap::Args)]
struct ConfigArgument {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    // pingora's connector calls a pooled stream it could not take an error; it makes a new one.
    let filter = "info,pingora=warn,pingora_core::connectors=off";
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(filter)).init();
    match execute(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("edgemeter: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(argument) => app::run(Config::load(argument.config)?),
        Command::Check(argument) => {
            print!("{}", Config::load(argument.config)?.listing());
            Ok(())
        }
        Command::Doctor(argument) => {
            let (text, fit) = doctor::examine(&Config::load(argument.config)?);
            print!("{text}");
            anyhow::ensure!(fit, "something the gateway needs is missing");
            Ok(())
        }
        Command::Report(argument) => {
            print!("{}", report::render(&Config::load(argument.config)?)?);
            Ok(())
        }
        Command::Detach(argument) => {
            let config = Config::load(argument.config)?;
            let Some(observe) = &config.observe else {
                anyhow::bail!(
                    "observe is absent or disabled in the configuration: nothing to detach"
                );
            };
            let pins = kernel::PinDirectory::open(&observe.bpffs)?;
            let _lock = pins.lock()?;
            for interface in &observe.interfaces {
                kernel::remove_clsact(interface);
            }
            pins.remove()?;
            println!("detached; the kernel counters are gone, the ledger keeps what was posted");
            Ok(())
        }
    }
}
