//! Arguments in, exit code out.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use edgemeter::{
    admin, app,
    config::{Config, Effect},
    connections::{self, Filter},
    cost, doctor, flows, kernel,
    ledger::Ledger,
    report,
};

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
    Run(RunArguments),
    /// Start the running gateway's binary anew, for a new version or configuration, and hand over
    /// to it. If that fails, the running one serves on.
    Upgrade(ConfigArgument),
    /// Sample where the running gateway spends its CPU time and print a flame graph, an SVG.
    Profile {
        #[command(flatten)]
        config: ConfigArgument,
        /// How long, 1 to 60.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// Check a configuration file and say what it means.
    Check(ConfigArgument),
    /// Say what would change if this file came into force, and whether a reload could do it.
    Diff(DiffArguments),
    /// Make the running gateway read its file again, and print what changed.
    Reload(ConfigArgument),
    /// Say what this machine can do for the gateway, and what is lost without it.
    Doctor(ConfigArgument),
    /// Print what the ledger holds, by route, with the conservation line. Works while serving.
    Report(ConfigArgument),
    /// Ask the running gateway for its TCP connections and whose they are.
    Connections(ConnectionsArguments),
    /// Print the kernel's flow table and where every byte of it is. Works while serving.
    Flows {
        #[command(flatten)]
        config: ConfigArgument,
        /// The largest so many; the sums are of all.
        #[arg(long, default_value_t = 20)]
        top: usize,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// What the bytes cost: reports, closed months, a provider's bill, calculators.
    #[command(subcommand)]
    Cost(cost::command::Command),
    /// Check, export or restore the ledger.
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// What the sinks of usage events have, and what to do about events in doubt.
    #[command(subcommand)]
    Push(PushCommand),
    /// Take the kernel programs off and drop their counters. Post them first: run until idle.
    Detach(ConfigArgument),
}

#[derive(clap::Args)]
struct ConfigArgument {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(clap::Args)]
struct RunArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Take over from the gateway at the other end of standard input: for `edgemeter upgrade`.
    #[arg(long, hide = true)]
    take_over: bool,
}

#[derive(Subcommand)]
enum LedgerCommand {
    /// Look for damage and for invariants that do not hold. Works while serving.
    Check(ConfigArgument),
    /// Write every row as text. Works while serving.
    Export {
        #[command(flatten)]
        config: ConfigArgument,
        /// File to write; it must not exist.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Fill an empty ledger from an export.
    Restore {
        #[command(flatten)]
        config: ConfigArgument,
        /// File to read.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
    },
}

#[derive(Subcommand)]
enum PushCommand {
    /// Print what each sink has and has not. Works while serving.
    Status(ConfigArgument),
    /// Decide about events in doubt or refused. Works while serving.
    Decide {
        #[command(flatten)]
        config: ConfigArgument,
        /// Sink name.
        #[arg(long)]
        sink: String,
        /// The sink has them: do not send them again.
        #[arg(
            long,
            conflicts_with = "not_arrived",
            required_unless_present = "not_arrived"
        )]
        arrived: bool,
        /// The sink does not have them: send them.
        #[arg(long)]
        not_arrived: bool,
    },
}

#[derive(clap::Args)]
struct DiffArguments {
    #[command(flatten)]
    new: ConfigArgument,
    /// Compare with this file; else with what the gateway at `admin.listen` runs.
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
}

#[derive(clap::Args)]
struct ConnectionsArguments {
    #[command(flatten)]
    config: ConfigArgument,
    /// Either address lies in this prefix, such as 10.0.0.0/8.
    #[arg(long)]
    cidr: Option<String>,
    /// Either port.
    #[arg(long)]
    port: Option<u16>,
    /// tcp.
    #[arg(long)]
    protocol: Option<String>,
    /// Process id, command, container id or its beginning, cgroup path, listener or upstream.
    #[arg(long)]
    owner: Option<String>,
    /// open, closed or all.
    #[arg(long, default_value = "open")]
    state: String,
    /// At most so many, newest first.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    /// As the gateway answers, with every field.
    #[arg(long)]
    json: bool,
}

impl ConnectionsArguments {
    fn filter(&self) -> Result<Filter, connections::FilterError> {
        let port = self.port.map(|port| port.to_string());
        let limit = self.limit.to_string();
        let mut filter = Filter::default();
        for (name, value) in [
            ("cidr", self.cidr.as_deref()),
            ("port", port.as_deref()),
            ("protocol", self.protocol.as_deref()),
            ("owner", self.owner.as_deref()),
            ("state", Some(self.state.as_str())),
            ("limit", Some(limit.as_str())),
        ] {
            if let Some(value) = value {
                filter.set(name, value)?;
            }
        }
        Ok(filter)
    }
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
        Command::Run(arguments) => app::run(&arguments.config.config, arguments.take_over),
        Command::Upgrade(argument) => {
            let config = Config::load(argument.config)?;
            let (status, said) = admin::client::ask(&config.admin, "POST", "/upgrade")?;
            anyhow::ensure!(status == 200, "{}", said.trim_end());
            print!("{said}");
            Ok(())
        }
        Command::Profile { config, seconds } => {
            let config = Config::load(config.config)?;
            let path = format!("/profile?seconds={seconds}");
            let (status, said) = admin::client::ask(&config.admin, "GET", &path)?;
            anyhow::ensure!(status == 200, "{}", said.trim_end());
            print!("{said}");
            Ok(())
        }
        Command::Diff(arguments) => diff(&arguments),
        Command::Reload(argument) => {
            let config = Config::load(argument.config)?;
            let (status, said) = admin::client::ask(&config.admin, "POST", "/reload")?;
            anyhow::ensure!(status == 200, "{}", said.trim_end());
            print!("{said}");
            Ok(())
        }
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
        Command::Connections(arguments) => {
            let filter = arguments.filter()?;
            let config = Config::load(&arguments.config.config)?;
            let text = connections::print(&config.admin, &filter, arguments.json)?;
            print!("{text}");
            Ok(())
        }
        Command::Flows { config, top, json } => {
            let config = Config::load(config.config)?;
            let observe = config.observe.as_ref();
            let observe = observe.context("observe is absent or disabled in the configuration")?;
            let listing = flows::read(observe, top)?;
            if json {
                println!("{}", listing.json());
            } else {
                print!("{}", listing.text()?);
            }
            Ok(())
        }
        Command::Cost(command) => cost::command::run(&command),
        Command::Ledger(command) => ledger(command),
        Command::Push(command) => push(command),
        Command::Detach(argument) => {
            let config = Config::load(argument.config)?;
            let Some(observe) = &config.observe else {
                anyhow::bail!(
                    "observe is absent or disabled in the configuration: nothing to detach"
                );
            };
            let pins = kernel::PinDirectory::open(&observe.bpffs)?;
            let _lock = pins.lock()?;
            let selection = app::selection(observe);
            let marked = pins.clsact_interfaces()?;
            for device in kernel::devices()? {
                if selection.wants(&device.name) || marked.contains(&device.name) {
                    kernel::remove_clsact(&device.name);
                }
            }
            pins.remove()?;
            println!("detached; the kernel counters are gone, the ledger keeps what was posted");
            Ok(())
        }
    }
}

fn open_ledger(argument: ConfigArgument) -> anyhow::Result<(Config, Ledger)> {
    let config = Config::load(argument.config)?;
    let ledger = Ledger::open_at(&config.gateway.ledger, &config.gateway.id)?;
    Ok((config, ledger))
}

fn ledger(command: LedgerCommand) -> anyhow::Result<()> {
    match command {
        LedgerCommand::Check(argument) => {
            let (_, ledger) = open_ledger(argument)?;
            let (text, sound) = edgemeter::ledger::check(&ledger)?;
            print!("{text}");
            anyhow::ensure!(sound, "the ledger breaks its invariants");
        }
        LedgerCommand::Export { config, to } => {
            let (_, ledger) = open_ledger(config)?;
            let file =
                std::fs::File::create_new(&to).with_context(|| format!("--to {}", to.display()))?;
            let rows = edgemeter::ledger::export(&ledger, &mut std::io::BufWriter::new(&file))?;
            file.sync_all()?;
            println!("{rows} rows of {} in {}", ledger.place(), to.display());
        }
        LedgerCommand::Restore { config, from } => {
            let (_, ledger) = open_ledger(config)?;
            let _alone = ledger.take()?;
            let file =
                std::fs::File::open(&from).with_context(|| format!("--from {}", from.display()))?;
            let rows = edgemeter::ledger::restore(&ledger, &mut std::io::BufReader::new(file))?;
            println!("{rows} rows of {} in {}", from.display(), ledger.place());
        }
    }
    Ok(())
}

fn push(command: PushCommand) -> anyhow::Result<()> {
    match command {
        PushCommand::Status(argument) => {
            let (config, ledger) = open_ledger(argument)?;
            print!("{}", edgemeter::push::status(&config.push, &ledger)?);
        }
        PushCommand::Decide {
            config,
            sink,
            arrived,
            ..
        } => {
            let (config, ledger) = open_ledger(config)?;
            anyhow::ensure!(
                config.push.iter().any(|known| *known.name == *sink),
                "no sink is named \"{sink}\""
            );
            let events = ledger.decide(&sink, arrived)?;
            println!("{events} events decided about");
        }
    }
    Ok(())
}

/// A dry run: nothing is brought into force.
fn diff(arguments: &DiffArguments) -> anyhow::Result<()> {
    let new = Config::load(&arguments.new.config)?;
    let running = match &arguments.against {
        Some(path) => Config::load(path)?,
        None => {
            let (status, text) = admin::client::ask(&new.admin, "GET", "/config")?;
            anyhow::ensure!(status == 200, "{}", text.trim_end());
            Config::parse(&text, &arguments.new.config)?
        }
    };
    let changes = running.diff(&new);
    for change in &changes {
        println!("{change}");
    }
    let restart = changes.iter().any(|change| change.effect != Effect::Reload);
    println!(
        "{} changes; {}",
        changes.len(),
        if restart {
            "a reload would refuse them: restart or upgrade"
        } else {
            "a reload applies them"
        }
    );
    Ok(())
}
