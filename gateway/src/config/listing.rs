//! The summary `edgemeter check` prints.

use std::fmt;

use super::{AccessLogTarget, Action, Config, Direction, Leg, Observe, Upstream};

/// What else is observed, or is not.
struct Beside<'a>(&'a Observe);

impl fmt::Display for Beside<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(observe) = self;
        if !observe.exclude.is_empty() {
            write!(f, " without {}", observe.exclude.join(" "))?;
        }
        for namespace in &observe.namespaces {
            write!(f, " and in {}", namespace.name)?;
        }
        if !observe.boundary.is_empty() {
            write!(f, ", boundary {}", observe.boundary.join(" "))?;
        }
        Ok(())
    }
}

pub(super) struct Listing<'c>(pub(super) &'c Config);

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.process(f)?;
        self.traffic(f)?;
        self.classes(f)?;
        self.prices(f)
    }
}

impl Listing<'_> {
    fn process(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config {
            gateway,
            admin,
            observe,
            access_log,
            ..
        } = self.0;
        writeln!(
            f,
            "gateway     state {}, {} threads, grace {:?}",
            gateway.state_dir.display(),
            gateway.threads,
            gateway.grace
        )?;
        writeln!(f, "admin       {}", admin.listen)?;
        match observe {
            Some(observe) => writeln!(
                f,
                "observe     {}{} ({:?}, every {:?}{})",
                observe.interfaces.join(" "),
                Beside(observe),
                observe.attach,
                observe.collect_interval,
                if observe.required { ", required" } else { "" }
            )?,
            None => writeln!(f, "observe     off")?,
        }
        match access_log.as_ref().map(|log| &log.target) {
            Some(AccessLogTarget::File(path)) => writeln!(f, "access log  {}", path.display()),
            Some(AccessLogTarget::StandardOutput) => writeln!(f, "access log  standard output"),
            None => writeln!(f, "access log  off"),
        }
    }

    fn classes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for class in &self.0.classes {
            let cidrs: Vec<String> = class.cidrs.iter().map(ToString::to_string).collect();
            writeln!(f, "class       {}: {}", class.name, cidrs.join(" "))?;
        }
        Ok(())
    }

    fn traffic(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.0;
        for listener in &config.listeners {
            let protocol = match (&listener.tls, listener.http2) {
                (None, true) => "http/1.1 h2c",
                (None, false) => "http/1.1",
                (Some(_), true) => "tls http/1.1 h2",
                (Some(_), false) => "tls http/1.1",
            };
            writeln!(
                f,
                "listener    {} {} {protocol}",
                listener.name, listener.address
            )?;
        }
        for upstream in &config.upstreams {
            writeln!(
                f,
                "upstream    {} {} -> {}",
                upstream.name,
                if upstream.http2 { "h2" } else { "http/1.1" },
                peers(upstream)
            )?;
        }
        for route in &config.routes {
            let listeners = route
                .listeners
                .iter()
                .map(|index| &config.listeners[index.0].name);
            let hosts = if route.hosts.is_empty() {
                "*".to_owned()
            } else {
                joined(&route.hosts, ",")
            };
            let matches = route.matches.iter().map(|one| {
                let methods = if one.methods.is_empty() {
                    "*".to_owned()
                } else {
                    joined(&one.methods, ",")
                };
                let more = one.headers.len() + one.query.len();
                let more = match more {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                format!("{methods} {hosts}{}{more}", one.path)
            });
            writeln!(
                f,
                "route       {} on {}: {} -> {} (service {}, tenant {})",
                route.name,
                joined(listeners, ","),
                joined(matches, " or "),
                target(config, &route.action),
                route.service,
                route.tenant
            )?;
        }
        Ok(())
    }

    fn prices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(prices) = &self.0.prices else {
            return writeln!(f, "prices      none: bytes are counted, not priced");
        };
        if !prices.is_flat() {
            return writeln!(
                f,
                "prices      {} ({} SKUs, {}, {}, sha256 {})",
                prices.book.file,
                prices.book.skus.len(),
                prices.currency,
                prices.book.zone.name(),
                &prices.book.hash[..12]
            );
        }
        for price in &prices.rates {
            let leg = match price.leg {
                Leg::Client => "client",
                Leg::Upstream => "upstream",
            };
            let direction = match price.direction {
                Direction::Tx => "tx",
                Direction::Rx => "rx",
            };
            writeln!(
                f,
                "price       {} {leg} {direction}: {} {} per {} bytes",
                price.id, price.rate.price, prices.currency, price.rate.unit_bytes
            )?;
        }
        Ok(())
    }
}

fn target(config: &Config, action: &Action) -> String {
    match action {
        Action::Redirect(redirect) => format!("redirect {}", redirect.status),
        Action::Forward { backends, .. } => {
            let alone = backends.len() == 1;
            let backends = backends.iter().map(|backend| {
                let name = &config.upstreams[backend.upstream.0].name;
                match backend.weight {
                    _ if alone => name.to_string(),
                    weight => format!("{name} x{weight}"),
                }
            });
            joined(backends, ", ")
        }
    }
}

fn peers(upstream: &Upstream) -> String {
    let peers = upstream.peers.iter().map(|peer| match peer.weight.get() {
        1 => peer.address.to_string(),
        weight => format!("{} x{weight}", peer.address),
    });
    joined(peers, ", ")
}

fn joined<T: fmt::Display>(items: impl IntoIterator<Item = T>, separator: &str) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(separator)
}
