//! The `commerce` executable: arguments in, exit code out.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use commerce::config::{
    Arguments, AuditArguments, Command, Config, ProviderArguments, RehearseArguments,
};
use commerce::fake::{self, Faults};
use commerce::webhook::Secret;
use commerce::{app, audit, rehearsal};

/// Requests allocate on one thread and free on another, which the system's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Serve(serve) => {
            start_log(serve.log_level);
            run_service(&Config::from(*serve))
        }
        Command::Audit(audit) => run_audit(&audit),
        Command::Rehearse(rehearse) => run_rehearsal(&rehearse),
        Command::Provider(provider) => run_provider(provider),
    };
    outcome.unwrap_or_else(|error| {
        // Standard error may be closed; there is then nobody left to tell.
        let _ = writeln!(std::io::stderr(), "commerce: {error:#}");
        ExitCode::FAILURE
    })
}

/// JSON lines on standard error, so that standard output stays free for results.
fn start_log(level: tracing::Level) {
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .init();
}

fn run_service(config: &Config) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        // Before the port opens: a signal in between must drain, not kill.
        let stop = app::termination().context("installing signal handlers")?;
        let service = app::Service::start(config).await?;
        service.run(stop).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn run_audit(arguments: &AuditArguments) -> anyhow::Result<ExitCode> {
    let target = arguments.target.clone().into();
    let report = audit::audit(&target).with_context(|| format!("auditing {target}"))?;
    write!(std::io::stdout(), "{report}").context("writing the report")?;
    Ok(if report.is_clean() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_rehearsal(arguments: &RehearseArguments) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    let duration = std::time::Duration::from_secs(arguments.seconds);
    let measured = rehearsal::run(&arguments.database, arguments.clients, duration);
    let measured = runtime.block_on(measured)?;
    writeln!(std::io::stdout(), "{measured}").context("writing the result")?;
    Ok(ExitCode::SUCCESS)
}

fn run_provider(arguments: ProviderArguments) -> anyhow::Result<ExitCode> {
    let secret = Secret::parse(&arguments.shared_secret).context("--shared-secret")?;
    let faults = Faults {
        seed: arguments.seed,
        decline: arguments.decline,
        lose: arguments.lose,
        duplicate: arguments.duplicate,
        slow_ms: arguments.slow_ms,
    };
    let runtime = tokio::runtime::Runtime::new().context("starting the runtime")?;
    runtime.block_on(async {
        let stop = app::termination().context("installing signal handlers")?;
        let listener = tokio::net::TcpListener::bind(arguments.listen).await;
        let listener = listener.with_context(|| format!("listening on {}", arguments.listen))?;
        tokio::select! {
            served = fake::serve(listener, arguments.callback, secret, faults) => served?,
            () = stop => {}
        }
        Ok(ExitCode::SUCCESS)
    })
}
