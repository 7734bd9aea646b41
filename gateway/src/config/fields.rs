//! One example line for every field, to quote in a fix. A test keeps it complete. Features with a
//! file of their own have their lines there.

use super::{experiment, route, upstream};

/// Every list of examples.
pub(super) fn all() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    [
        EXAMPLES,
        upstream::EXAMPLES,
        experiment::EXAMPLES,
        route::EXAMPLES,
    ]
    .into_iter()
    .flatten()
}

/// Field paths without indices, each with a line that would be right there.
const EXAMPLES: &[(&str, &str)] = &[
    ("gateway", "[gateway]"),
    ("gateway.state_dir", r#"state_dir = "/var/lib/edgemeter""#),
    ("gateway.threads", "threads = 2"),
    ("gateway.grace_seconds", "grace_seconds = 10"),
    ("gateway.lane", r#"lane = "auto""#),
    ("gateway.id", r#"id = "edge-1""#),
    (
        "gateway.ledger",
        r#"ledger = "postgres://edgemeter@db.example/bill""#,
    ),
    ("retention", "[retention]"),
    ("retention.minutes_for_days", "minutes_for_days = 62"),
    ("retention.hours_for_days", "hours_for_days = 400"),
    ("retention.days_for_days", "days_for_days = 1830"),
    ("push", "[[push]]"),
    ("push.name", r#"name = "billing""#),
    ("push.url", r#"url = "https://meter.example/api/v1/events""#),
    ("push.secret_file", r#"secret_file = "push.secret""#),
    ("push.token_file", r#"token_file = "push.token""#),
    ("push.ca_file", r#"ca_file = "ca.pem""#),
    (
        "push.confirm_url",
        r#"confirm_url = "https://meter.example/api/v1/events/{id}""#,
    ),
    ("push.tenants", r#"tenants = ["acme"]"#),
    ("push.unattributed", "unattributed = false"),
    ("push.batch", "batch = 100"),
    ("push.window_seconds", "window_seconds = 60"),
    ("push.timeout_ms", "timeout_ms = 10000"),
    ("push.dedupe_seconds", "dedupe_seconds = 86400"),
    ("push.keep_days", "keep_days = 35"),
    ("budgets", "[[budgets]]"),
    ("budgets.name", r#"name = "acme-month""#),
    ("budgets.period", r#"period = "month""#),
    ("budgets.limit_bytes", "limit_bytes = 1000000000000"),
    ("budgets.limit_money", r#"limit_money = "500.00""#),
    ("budgets.routes", r#"routes = ["orders-create"]"#),
    ("budgets.services", r#"services = ["commerce"]"#),
    ("budgets.tenants", r#"tenants = ["acme"]"#),
    ("budgets.timezone", r#"timezone = "Asia/Shanghai""#),
    ("budgets.warn_percent", "warn_percent = [50, 80, 95]"),
    ("budgets.action", r#"action = "warn""#),
    (
        "budgets.throttle_bytes_per_second",
        "throttle_bytes_per_second = 1000000",
    ),
    ("admin", "[admin]"),
    ("admin.listen", r#"listen = "127.0.0.1:9901""#),
    (
        "admin.token_file",
        r#"token_file = "/var/lib/edgemeter/admin.token""#,
    ),
    ("observe", "[observe]"),
    ("observe.enabled", "enabled = true"),
    ("observe.interfaces", r#"interfaces = ["eth0"]"#),
    ("observe.exclude", r#"exclude = ["veth*"]"#),
    ("observe.boundary", r#"boundary = ["eth0"]"#),
    ("observe.namespaces", r#"namespaces = ["blue"]"#),
    ("observe.attach", r#"attach = "auto""#),
    ("observe.bpffs", r#"bpffs = "/sys/fs/bpf/edgemeter""#),
    ("observe.flows_max", "flows_max = 262144"),
    ("observe.connections_max", "connections_max = 16384"),
    ("observe.accounts_max", "accounts_max = 16384"),
    ("observe.collect_interval_ms", "collect_interval_ms = 1000"),
    ("observe.required", "required = false"),
    ("observe.kernel_log", r#"kernel_log = "off""#),
    ("access_log", "[access_log]"),
    ("access_log.path", r#"path = "-""#),
    ("access_log.queue", "queue = 65536"),
    ("access_log.settle_ms", "settle_ms = 5000"),
    ("listeners", "[[listeners]]"),
    ("listeners.name", r#"name = "public""#),
    ("listeners.address", r#"address = "0.0.0.0:8080""#),
    ("listeners.http2", "http2 = true"),
    ("listeners.tls", "[listeners.tls]"),
    ("listeners.tls.certificate", r#"certificate = "cert.pem""#),
    ("listeners.tls.key", r#"key = "key.pem""#),
    ("classes", "[[classes]]"),
    ("classes.name", r#"name = "internet""#),
    ("classes.cidrs", r#"cidrs = ["0.0.0.0/0", "::/0"]"#),
    ("prices", "[prices]"),
    ("prices.book", r#"book = "prices.toml""#),
    ("prices.currency", r#"currency = "USD""#),
    ("prices.rates", "[[prices.rates]]"),
    ("prices.rates.id", r#"id = "internet-out""#),
    ("prices.rates.leg", r#"leg = "client""#),
    ("prices.rates.direction", r#"direction = "tx""#),
    ("prices.rates.price", r#"price = "0.09""#),
    ("prices.rates.unit_bytes", "unit_bytes = 1073741824"),
];

/// The same for a price book, whose fields begin at its own top.
pub(super) const BOOK_EXAMPLES: &[(&str, &str)] = &[
    ("currency", r#"currency = "USD""#),
    ("timezone", r#"timezone = "UTC""#),
    ("account", "[account]"),
    ("account.id", r#"id = "123456""#),
    ("account.name", r#"name = "shop""#),
    ("account.provider", r#"provider = "example-cloud""#),
    ("account.region", r#"region = "cn-hangzhou""#),
    ("account.region_name", r#"region_name = "Hangzhou""#),
    (
        "account.availability_zone",
        r#"availability_zone = "cn-hangzhou-h""#,
    ),
    ("fx", "[[fx]]"),
    ("fx.from", r#"from = "USD""#),
    ("fx.to", r#"to = "CNY""#),
    ("fx.rate", r#"rate = "7.12""#),
    ("fx.as_of", r#"as_of = "2026-11-01""#),
    ("skus", "[[skus]]"),
    ("skus.id", r#"id = "internet-out""#),
    ("skus.description", r#"description = "to the internet""#),
    ("skus.source", r#"source = "price list, read 2026-11-01""#),
    (
        "skus.bill_names",
        r#"bill_names = ["DataTransfer-Out-Bytes"]"#,
    ),
    ("skus.currency", r#"currency = "USD""#),
    ("skus.leg", r#"leg = "client""#),
    ("skus.direction", r#"direction = "tx""#),
    ("skus.class", r#"class = "internet""#),
    ("skus.interfaces", r#"interfaces = ["eth0"]"#),
    ("skus.basis", r#"basis = "bytes""#),
    ("skus.unit_bytes", "unit_bytes = 1073741824"),
    ("skus.tier_mode", r#"tier_mode = "graduated""#),
    ("skus.pool", r#"pool = "account-month""#),
    ("skus.free_units", "free_units = 100"),
    ("skus.price", r#"price = "0.09""#),
    (
        "skus.tiers",
        r#"tiers = [{ to = 10240, price = "0.09" }, { price = "0.085" }]"#,
    ),
    ("skus.tiers.to", "to = 10240"),
    ("skus.tiers.price", r#"price = "0.09""#),
    (
        "skus.adders",
        r#"adders = [{ id = "nat", price = "0.045" }]"#,
    ),
    ("skus.adders.id", r#"id = "nat""#),
    ("skus.adders.price", r#"price = "0.045""#),
    ("skus.fixed_per_day", r#"fixed_per_day = "0.48""#),
    ("skus.sample_s", "sample_s = 300"),
    ("skus.mbps_decimals", "mbps_decimals = 6"),
    ("skus.method", "method = { drop_top_pct = 5 }"),
    ("skus.method.day_rank", "day_rank = 5"),
    ("skus.method.month_mean_top", "month_mean_top = 5"),
    ("skus.method.drop_top_pct", "drop_top_pct = 5"),
    ("skus.commit", "commit = { cap_mbps = 500, floor_pct = 20 }"),
    ("skus.commit.cap_mbps", "cap_mbps = 500"),
    ("skus.commit.floor_pct", "floor_pct = 20"),
    ("skus.commit.from", r#"from = "2026-11-01""#),
    ("skus.commit.until", r#"until = "2026-12-01""#),
    ("skus.prorate", r#"prorate = "valid_days""#),
    ("skus.from", r#"from = "2026-11-01""#),
    ("skus.until", r#"until = "2026-12-01""#),
    ("compute", "[[compute]]"),
    ("compute.id", r#"id = "core""#),
    (
        "compute.source",
        r#"source = "price list, read 2026-11-01""#,
    ),
    ("compute.core_hour", r#"core_hour = "0.04""#),
    ("compute.gib_hour", r#"gib_hour = "0.004""#),
];

/// The line to write for a field such as `routes[3].path`.
pub(super) fn example(field: &str) -> Option<&'static str> {
    let plain: String = field
        .split('[')
        .map(|part| part.split_once(']').map_or(part, |(_, after)| after))
        .collect();
    all()
        .chain(BOOK_EXAMPLES)
        .find(|&&(path, _)| path == plain)
        .map(|&(_, line)| line)
}
