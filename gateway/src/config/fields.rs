//! One example line for every field, to quote in a fix. A test keeps it complete.

/// Field paths without indices, each with a line that would be right there.
pub(super) const EXAMPLES: &[(&str, &str)] = &[
    ("gateway", "[gateway]"),
    ("gateway.state_dir", r#"state_dir = "/var/lib/edgemeter""#),
    ("gateway.threads", "threads = 2"),
    ("gateway.grace_seconds", "grace_seconds = 10"),
    ("admin", "[admin]"),
    ("admin.listen", r#"listen = "127.0.0.1:9901""#),
    (
        "admin.token_file",
        r#"token_file = "/var/lib/edgemeter/admin.token""#,
    ),
    ("observe", "[observe]"),
    ("observe.enabled", "enabled = true"),
    ("observe.interfaces", r#"interfaces = ["eth0"]"#),
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
    ("upstreams", "[[upstreams]]"),
    ("upstreams.name", r#"name = "orders""#),
    ("upstreams.peers", r#"peers = ["10.0.0.2:9000"]"#),
    ("upstreams.peers.address", r#"address = "10.0.0.2:9000""#),
    ("upstreams.peers.weight", "weight = 2"),
    ("upstreams.http2", "http2 = false"),
    ("upstreams.connect_timeout_ms", "connect_timeout_ms = 1000"),
    ("upstreams.read_timeout_ms", "read_timeout_ms = 30000"),
    ("upstreams.write_timeout_ms", "write_timeout_ms = 30000"),
    ("upstreams.idle_timeout_ms", "idle_timeout_ms = 30000"),
    ("upstreams.retries", "retries = 1"),
    ("routes", "[[routes]]"),
    ("routes.name", r#"name = "orders-create""#),
    ("routes.service", r#"service = "commerce""#),
    (
        "routes.tenant",
        r#"tenant = { header = "x-tenant", default = "public" }"#,
    ),
    ("routes.tenant.header", r#"header = "x-tenant""#),
    ("routes.tenant.default", r#"default = "public""#),
    ("routes.listeners", r#"listeners = ["public"]"#),
    ("routes.hosts", r#"hosts = ["shop.example"]"#),
    ("routes.path", r#"path = { prefix = "/api" }"#),
    ("routes.path.exact", r#"exact = "/x""#),
    ("routes.path.prefix", r#"prefix = "/api""#),
    ("routes.methods", r#"methods = ["GET"]"#),
    ("routes.upstream", r#"upstream = "orders""#),
    ("prices", "[prices]"),
    ("prices.currency", r#"currency = "USD""#),
    ("prices.rates", "[[prices.rates]]"),
    ("prices.rates.id", r#"id = "internet-out""#),
    ("prices.rates.leg", r#"leg = "client""#),
    ("prices.rates.direction", r#"direction = "tx""#),
    ("prices.rates.price", r#"price = "0.09""#),
    ("prices.rates.unit_bytes", "unit_bytes = 1073741824"),
];

/// The line to write for a field such as `routes[3].path`.
pub(super) fn example(field: &str) -> Option<&'static str> {
    let plain: String = field
        .split('[')
        .map(|part| part.split_once(']').map_or(part, |(_, after)| after))
        .collect();
    EXAMPLES
        .iter()
        .find(|&&(path, _)| path == plain)
        .map(|&(_, line)| line)
}
