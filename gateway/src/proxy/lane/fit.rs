//! Which listeners and routes the lean lane may serve: those that ask for nothing it lacks.
//!
//! The patterns below name every field on purpose. A new field of the configuration does not
//! compile here until somebody has said whether the lean lane honours it; in doubt, write that a
//! route with it does not fit, and the full lane serves it.

use crate::config::{
    Action, Balance, Config, HeaderEdits, Lane, Listener, Policy, Rewrite, Route, Upstream,
};

/// By place in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// HTTP/2 connections are this lane's, which hands on the streams that do not fit.
    http2: bool,
    /// Listeners whose connections may begin on the lean lane.
    listeners: Vec<bool>,
    /// Routes it may serve.
    routes: Vec<bool>,
}

impl Fit {
    /// Looks at a whole configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let Config {
            gateway,
            // None of these is about a request.
            admin: _,
            classes: _,
            observe: _,
            access_log: _,
            prices: _,
            retention: _,
            push: _,
            // Asked for by routes' policies.
            tokens: _,
            forward_auth: _,
            rate_store: _,
            cache: _,
            budgets,
            // A request that is to be recorded leaves the lane; any other keeps its headers.
            tracing: _,
            text: _,
            listeners,
            upstreams,
            // Only routes refer to them.
            experiments: _,
            routes,
        } = config;
        let wanted = gateway.lane == Lane::Auto;
        let routes = routes.iter().map(|route| {
            let fits = |upstream| upstreams.get(upstream).is_some_and(upstream_fits);
            // Warnings, pace and refusals are the full lane's.
            let acted_on = budgets.iter().any(|budget| budget.may_act_on(route));
            wanted && !acted_on && route_fits(route) && route.upstreams().all(|index| fits(index.0))
        });
        Self {
            http2: wanted,
            listeners: listeners
                .iter()
                .map(|listener| wanted && listener_fits(listener))
                .collect(),
            routes: routes.collect(),
        }
    }

    /// Whether HTTP/2 connections are this lane's.
    #[must_use]
    pub fn http2(&self) -> bool {
        self.http2
    }

    /// Whether connections of a listener may begin on the lean lane.
    #[must_use]
    pub fn listener(&self, index: usize) -> bool {
        self.listeners.get(index).copied().unwrap_or(false)
    }

    /// Whether it may serve a route.
    #[must_use]
    pub fn route(&self, index: usize) -> bool {
        self.routes.get(index).copied().unwrap_or(false)
    }
}

fn listener_fits(listener: &Listener) -> bool {
    let Listener {
        name: _,
        address: _,
        // What a connection speaks is known before either lane begins.
        http2: _,
        tls: _,
        // The connection's part is done before either lane begins.
        protection,
    } = listener;
    protection.trusted_proxies.is_empty() && protection.limits.body_bytes_max.is_none()
}

fn route_fits(route: &Route) -> bool {
    let Route {
        name: _,
        service: _,
        tenant,
        // Matching is the router's, for both lanes.
        listeners: _,
        hosts: _,
        matches: _,
        action,
        request_headers,
        response_headers,
        mirror,
        experiments,
        request_timeout,
        try_timeout,
        policy,
    } = route;
    let forwards = match action {
        Action::Forward {
            backends: _,
            rewrite,
        } => *rewrite == Rewrite::default(),
        Action::Redirect(_) => false,
    };
    let unchanged = |edits: &HeaderEdits| *edits == HeaderEdits::default();
    forwards
        && unchanged(request_headers)
        && unchanged(response_headers)
        && mirror.is_none()
        && experiments.is_empty()
        && request_timeout.is_none()
        && try_timeout.is_none()
        && !tenant.needs_identity()
        && *policy == Policy::default()
}

fn upstream_fits(upstream: &Upstream) -> bool {
    let Upstream {
        name: _,
        peers: _,
        http2,
        tls,
        proxy_protocol,
        connect_timeout: _,
        read_timeout: _,
        write_timeout: _,
        idle_timeout: _,
        balance,
        // The pool's, for both lanes.
        kernel_informed: _,
        resolve_interval: _,
        retry: _,
        ejection: _,
        check: _,
        limits: _,
    } = upstream;
    !*http2 && !matches!(balance, Balance::Hash(_)) && tls.is_none() && proxy_protocol.is_none()
}
