//! Command line arguments, and the validated [`Config`] made from them.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::campaigns;
use crate::catalogue::Sku;
use crate::command::forget::Keep;
use crate::store::Target;

/// The order service behind the gateway.
#[derive(Debug, Parser)]
#[command(name = "commerce", version)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the executable does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the order API until SIGTERM or SIGINT, then drain.
    Serve(Box<ServeArguments>),
    /// Prove that a database keeps its promises; exit 1 and name the violation otherwise.
    Audit(AuditArguments),
    /// Measure how many durable orders a second this machine's disk takes, without HTTP.
    Rehearse(RehearseArguments),
    /// A payment provider for tests, whose callbacks are slow, doubled, lost and reordered.
    Provider(ProviderArguments),
}

/// Arguments of `commerce rehearse`.
#[derive(Debug, Args)]
pub struct RehearseArguments {
    /// A file that does not exist yet, on the disk in question.
    #[arg(long)]
    pub database: PathBuf,
    /// Orders under way at once.
    #[arg(long, default_value = "256", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub clients: u32,
    /// For how long.
    #[arg(long, default_value = "5")]
    pub seconds: u64,
}

/// Arguments of `commerce provider`.
#[derive(Debug, Args)]
pub struct ProviderArguments {
    /// Address to accept connections on.
    #[arg(long, default_value = "127.0.0.1:9100")]
    pub listen: SocketAddr,
    /// The service's callback, such as `http://127.0.0.1:9000/api/v1/payments/callback`.
    #[arg(long)]
    pub callback: String,
    /// `whsec_…`: signs the callbacks.
    #[arg(long)]
    pub shared_secret: String,
    /// Decides which callbacks go wrong.
    #[arg(long, default_value = "1")]
    pub seed: u64,
    /// Percent of charges that are declined.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u8).range(..=100))]
    pub decline: u8,
    /// Percent of callbacks that never come.
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u8).range(..=100))]
    pub lose: u8,
    /// Percent of callbacks that come twice.
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u8).range(..=100))]
    pub duplicate: u8,
    /// Longest delay of a callback, in milliseconds.
    #[arg(long, default_value = "500")]
    pub slow_ms: u64,
}

/// Arguments of `commerce serve`.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Address to accept connections on; port 0 takes a free one and logs it.
    #[arg(long, default_value = "127.0.0.1:9000")]
    pub listen: SocketAddr,
    /// Where the orders are.
    #[command(flatten)]
    pub target: TargetArguments,
    /// Several machines: the Redis that turns sold-out orders away, `redis://host:port/`.
    #[arg(long)]
    pub gate: Option<String>,
    /// Where the risk service takes batches of events.
    #[arg(long)]
    pub risk_url: Option<String>,
    /// The payment provider; without one, paying is immediate.
    #[arg(long)]
    pub provider_url: Option<String>,
    /// A PEM file of authorities that sinks may have their certificates from, beside the
    /// system's.
    #[arg(long)]
    pub sink_ca: Option<PathBuf>,
    /// `whsec_…`: signs what is sent to the risk service and the provider, and what the
    /// provider sends. COMMERCE_SHARED_SECRET in the environment says the same.
    #[arg(long)]
    pub shared_secret: Option<String>,
    /// Seconds without a callback after which the provider is asked about a payment.
    #[arg(long, default_value = "30")]
    pub provider_check_seconds: u32,
    /// How long an unpaid order keeps its stock, in seconds.
    #[arg(long, default_value = "900")]
    pub hold_seconds: u32,
    /// How long an idempotency key replays its answer, in hours.
    #[arg(long, default_value = "72", value_parser = clap::value_parser!(u32).range(24..))]
    pub keep_keys_hours: u32,
    /// How long an order's events are kept after its last one, in days. Events that a sink
    /// waits for stay.
    #[arg(long, default_value = "400", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_events_days: u32,
    /// The product whose paid order buys a period of membership.
    #[arg(long, default_value = "member-30d", value_parser = |text: &str| Sku::parse(text))]
    pub membership_sku: Sku,
    /// Discounts, group offers and experiments; read again when it changes.
    #[arg(long)]
    pub campaign: Option<PathBuf>,
    /// Seconds between two assessments of the experiments.
    #[arg(long, default_value = "60")]
    pub assess_seconds: u32,
    /// Seconds a campaign serves without harm before it counts as good.
    #[arg(long, default_value = "600")]
    pub good_after_seconds: u32,
    /// `iss` of the access tokens.
    #[arg(long, default_value = "https://commerce.example")]
    pub issuer: String,
    /// `aud` of the access tokens.
    #[arg(long, default_value = "shop")]
    pub audience: String,
    /// An origin, beside our own host, whose pages may watch groups; may be repeated.
    #[arg(long)]
    pub origin: Vec<String>,
    /// Commands that may wait for the writer before orders are refused with 503.
    #[arg(long, default_value = "1024")]
    pub queue_capacity: NonZeroUsize,
    /// Connections that read, and so reads that run at once.
    #[arg(long, default_value = "4")]
    pub readers: NonZeroU32,
    /// Fill an empty catalogue with demonstration products.
    #[arg(
        long,
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value_t = true,
        default_missing_value = "true"
    )]
    pub seed: bool,
    /// While draining, milliseconds between `/readyz` turning 503 and the port closing, so
    /// that a load balancer can look away first.
    #[arg(long, default_value = "500")]
    pub drain_announce_ms: u64,
    /// While draining, milliseconds that requests in flight may still take.
    #[arg(long, default_value = "10000")]
    pub drain_timeout_ms: u64,
    /// The least severe level logged: error, warn, info, debug or trace.
    #[arg(long, default_value = "info")]
    pub log_level: tracing::Level,
}

/// Arguments of `commerce audit`.
#[derive(Debug, Args)]
pub struct AuditArguments {
    /// The database to prove; opened read-only.
    #[command(flatten)]
    pub target: TargetArguments,
}

/// Which database, in one of two spellings.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct TargetArguments {
    /// The SQLite file; `serve` creates it when absent.
    #[arg(long)]
    pub database: Option<PathBuf>,
    /// `sqlite:FILE`, or `postgres://user@host:port/database` for several machines.
    #[arg(long)]
    pub store: Option<Target>,
}

impl From<TargetArguments> for Target {
    fn from(arguments: TargetArguments) -> Self {
        match arguments.store {
            Some(target) => target,
            // clap demands one of the two.
            None => Self::Sqlite(arguments.database.unwrap_or_default()),
        }
    }
}

/// Everything the service needs to know before it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to accept connections on.
    pub listen: SocketAddr,
    /// The database.
    pub store: Target,
    /// The Redis gate.
    pub gate_url: Option<String>,
    /// The risk service.
    pub risk_url: Option<String>,
    /// The payment provider.
    pub provider_url: Option<String>,
    /// Authorities of the sinks' certificates, beside the system's.
    pub sink_ca: Option<PathBuf>,
    /// Signs what is exchanged with both.
    pub shared_secret: Option<String>,
    /// How long a callback may take before the provider is asked.
    pub provider_check: Duration,
    /// How long an unpaid order keeps its stock.
    pub hold: Duration,
    /// How long what is not needed forever is kept.
    pub keep: Keep,
    /// What buys a period of membership.
    pub membership_sku: Sku,
    /// Where campaigns come from, and how they are judged.
    pub campaigns: campaigns::Settings,
    /// `iss` of the access tokens.
    pub issuer: String,
    /// `aud` of the access tokens.
    pub audience: String,
    /// Origins whose pages may watch groups.
    pub origins: Vec<String>,
    /// Commands that may wait for the writer.
    pub queue_capacity: NonZeroUsize,
    /// Connections that read.
    pub readers: NonZeroU32,
    /// Whether an empty catalogue is filled.
    pub seed: bool,
    /// Pause between announcing the drain and closing the port.
    pub drain_announce: Duration,
    /// Longest wait for requests in flight.
    pub drain_timeout: Duration,
}

impl From<ServeArguments> for Config {
    fn from(arguments: ServeArguments) -> Self {
        Self {
            listen: arguments.listen,
            store: arguments.target.into(),
            gate_url: arguments.gate,
            risk_url: arguments.risk_url,
            provider_url: arguments.provider_url,
            sink_ca: arguments.sink_ca,
            shared_secret: arguments
                .shared_secret
                .or_else(|| std::env::var("COMMERCE_SHARED_SECRET").ok()),
            provider_check: Duration::from_secs(arguments.provider_check_seconds.into()),
            hold: Duration::from_secs(arguments.hold_seconds.into()),
            keep: Keep {
                keys: Duration::from_secs(3_600 * u64::from(arguments.keep_keys_hours)),
                events: Duration::from_secs(86_400 * u64::from(arguments.keep_events_days)),
            },
            membership_sku: arguments.membership_sku,
            campaigns: campaigns::Settings {
                file: arguments.campaign,
                assess_every: Duration::from_secs(arguments.assess_seconds.into()),
                good_after: Duration::from_secs(arguments.good_after_seconds.into()),
            },
            issuer: arguments.issuer,
            audience: arguments.audience,
            origins: arguments.origin,
            queue_capacity: arguments.queue_capacity,
            readers: arguments.readers,
            seed: arguments.seed,
            drain_announce: Duration::from_millis(arguments.drain_announce_ms),
            drain_timeout: Duration::from_millis(arguments.drain_timeout_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(extra: &[&str]) -> Config {
        let mut line = vec!["commerce", "serve", "--database", "c.db"];
        line.extend(extra);
        match Arguments::parse_from(line).command {
            Command::Serve(arguments) => Config::from(*arguments),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn seeding_is_on_unless_refused() {
        assert!(serve(&[]).seed);
        assert!(serve(&["--seed"]).seed);
        assert!(!serve(&["--seed=false"]).seed);
    }

    #[test]
    fn a_queue_that_holds_nothing_is_refused() {
        let line = [
            "commerce",
            "serve",
            "--database",
            "c.db",
            "--queue-capacity",
            "0",
        ];
        assert!(Arguments::try_parse_from(line).is_err());
    }
}
