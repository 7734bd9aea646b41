//! The auditor: proves from the database alone that the service kept its promises.
//!
//! It trusts no code of the service: each `CHECKS` entry is one query that selects the
//! rows which break a promise. Everything is read in one snapshot, so a live database can
//! be audited while it serves.

use std::fmt;

use crate::store::sql::{Backend, Connection, SqlError};
use crate::store::{StoreError, Target, schema};

/// Violations shown per check; the count is always complete.
const SHOWN_MAX: usize = 10;

/// One promise.
struct Check {
    name: &'static str,
    promise: &'static str,
    /// What is counted as checked, and the query that counts it.
    subject: &'static str,
    /// The database it is about; `None` for both.
    only: Option<Backend>,
    count: &'static str,
    /// Selects one text per violation.
    violations: &'static str,
}

const CHECKS: &[Check] = &[
    Check {
        name: "stock_conserved",
        promise: "initial = available + reserved + sold, none negative",
        subject: "SKUs",
        only: None,
        count: "SELECT count(*) FROM stock",
        violations: "
            SELECT 'SKU ' || sku || ': initial ' || initial || ', available ' || available
                   || ', reserved ' || reserved || ', sold ' || sold
            FROM stock
            WHERE initial <> available + reserved + sold OR available < 0 OR reserved < 0 OR sold < 0",
    },
    Check {
        name: "stock_explained",
        promise: "reserved and sold are what open and paid orders hold",
        subject: "SKUs",
        only: None,
        count: "SELECT count(*) FROM stock",
        violations: "
            SELECT 'SKU ' || sku || ': reserved ' || reserved || ' for ' || held
                   || ', sold ' || sold || ' for ' || bought || ', restocked ' || back
            FROM (SELECT sku, reserved, sold,
                         (SELECT CAST(coalesce(sum(l.quantity), 0) AS BIGINT) FROM order_line AS l
                          JOIN orders AS o ON o.id = l.order_id
                          WHERE l.sku = stock.sku AND o.status = 'placed') AS held,
                         (SELECT CAST(coalesce(sum(l.quantity), 0) AS BIGINT) FROM order_line AS l
                          JOIN orders AS o ON o.id = l.order_id
                          WHERE l.sku = stock.sku
                            AND o.status IN ('paid', 'partially_refunded', 'refunded')) AS bought,
                         (SELECT CAST(coalesce(sum(r.quantity), 0) AS BIGINT) FROM refund_line AS r
                          WHERE r.sku = stock.sku AND r.restocked = 1) AS back
                  FROM stock) AS s
            WHERE reserved <> held OR sold <> bought - back",
    },
    Check {
        name: "ledger_balanced",
        promise: "sums of ledger movements = available, reserved, sold",
        subject: "movements",
        only: None,
        count: "SELECT count(*) FROM stock_movement",
        violations: "
            SELECT 'SKU ' || s.sku || ': movements sum to ' || m.available || ', ' || m.reserved
                   || ', ' || m.sold || '; stock is ' || s.available || ', ' || s.reserved || ', ' || s.sold
            FROM stock AS s JOIN
                (SELECT stock.sku, CAST(coalesce(sum(v.available), 0) AS BIGINT) AS available,
                        CAST(coalesce(sum(v.reserved), 0) AS BIGINT) AS reserved,
                        CAST(coalesce(sum(v.sold), 0) AS BIGINT) AS sold
                 FROM stock LEFT JOIN stock_movement AS v ON v.sku = stock.sku
                 GROUP BY stock.sku) AS m ON m.sku = s.sku
            WHERE m.available <> s.available OR m.reserved <> s.reserved OR m.sold <> s.sold",
    },
    Check {
        name: "ledger_explained",
        promise: "each order line was reserved exactly once, and each reservation has its line",
        subject: "order lines",
        only: None,
        count: "SELECT count(*) FROM order_line",
        violations: "
            SELECT 'order ' || coalesce(order_id, 'none') || ' SKU ' || sku || ': line ' || line
                   || ', movements ' || delta || ' in ' || entries
            FROM (SELECT order_id, sku, CAST(sum(quantity) AS BIGINT) AS line,
                         CAST(sum(available) AS BIGINT) AS delta, CAST(sum(entry) AS BIGINT) AS entries
                  FROM (SELECT order_id, sku, quantity, 0 AS available, 0 AS entry FROM order_line
                        UNION ALL
                        SELECT order_id, sku, 0, available, 1 FROM stock_movement
                        WHERE reason = 'reserve') AS both_sides
                  GROUP BY order_id, sku) AS s
            WHERE line = 0 OR line <> -delta OR entries <> 1",
    },
    Check {
        name: "one_order_per_key",
        promise: "each order has exactly one idempotency key until it is forgotten, and each created answer its order",
        subject: "keys",
        only: None,
        count: "SELECT count(*) FROM idempotency",
        violations: "
            SELECT 'order ' || o.id || ': ' || count(i.key) || ' keys'
            FROM orders AS o LEFT JOIN idempotency AS i ON i.order_id = o.id
            GROUP BY o.id, o.created_at_ms
            HAVING count(i.key) > 1 OR (count(i.key) = 0 AND o.created_at_ms >= coalesce(
                       (SELECT before_ms FROM retention WHERE subject = 'keys'), 0))
            UNION ALL
            SELECT 'key ' || i.principal || '/' || i.route || '/' || i.key || ': status ' || i.status
                   || ', order ' || coalesce(i.order_id, 'none')
            FROM idempotency AS i LEFT JOIN orders AS o ON o.id = i.order_id AND o.principal = i.principal
            WHERE (i.order_id IS NOT NULL OR i.route = 'POST /api/v1/orders')
              AND (i.status = 201) <> (o.id IS NOT NULL)",
    },
    Check {
        name: "order_totals",
        promise: "line total = unit price * quantity, order total = sum of lines - discounts",
        subject: "orders",
        only: None,
        count: "SELECT count(*) FROM orders",
        violations: "
            SELECT 'order ' || order_id || ' SKU ' || sku || ': ' || quantity || ' at ' || unit_price_minor
                   || ' is not ' || total_minor
            FROM order_line WHERE total_minor <> unit_price_minor * quantity
            UNION ALL
            SELECT 'order ' || o.id || ': total ' || o.total_minor || ', lines '
                   || coalesce(CAST(sum(l.total_minor - l.allocated_discount_minor) AS TEXT), 'none')
            FROM orders AS o LEFT JOIN order_line AS l ON l.order_id = o.id
            GROUP BY o.id, o.total_minor
            HAVING count(l.sku) = 0 OR sum(l.total_minor - l.allocated_discount_minor) <> o.total_minor",
    },
    Check {
        name: "refunds_reverse_lines",
        promise: "refunded = sum of refunded lines, no more than bought; a full refund is the total",
        subject: "refunds",
        only: None,
        count: "SELECT count(*) FROM refund",
        violations: "
            SELECT 'order ' || o.id || ': ' || o.status || ', total ' || o.total_minor || ', refunded '
                   || o.refunded_minor || ', lines ' || CAST(coalesce(sum(r.amount_minor), 0) AS BIGINT)
            FROM orders AS o LEFT JOIN refund_line AS r ON r.order_id = o.id
            GROUP BY o.id, o.status, o.total_minor, o.refunded_minor
            HAVING coalesce(sum(r.amount_minor), 0) <> o.refunded_minor
                OR (o.status = 'refunded' AND o.refunded_minor <> o.total_minor)
            UNION ALL
            SELECT 'order ' || l.order_id || ' SKU ' || l.sku || ': more units refunded than bought'
            FROM order_line AS l JOIN refund_line AS r ON r.order_id = l.order_id AND r.sku = l.sku
            GROUP BY l.order_id, l.sku, l.quantity HAVING sum(r.quantity) > l.quantity",
    },
    Check {
        name: "payments_add_up",
        promise: "a payment's amounts are the sums of its events; a paid order has its money",
        subject: "payments",
        only: None,
        count: "SELECT count(*) FROM payment",
        violations: "
            SELECT 'payment ' || p.id || ': captured ' || p.captured_minor || ', refunded '
                   || p.refunded_minor || ' are not its events'
            FROM payment AS p LEFT JOIN payment_event AS e ON e.payment_id = p.id
            GROUP BY p.id, p.captured_minor, p.refunded_minor
            HAVING p.captured_minor <> coalesce(sum(CASE WHEN e.kind = 'captured' THEN e.amount_minor END), 0)
                OR p.refunded_minor <> coalesce(sum(CASE WHEN e.kind = 'refunded' THEN e.amount_minor END), 0)
            UNION ALL
            SELECT 'order ' || o.id || ': ' || o.status || ' without the money'
            FROM orders AS o
            WHERE o.status IN ('paid', 'partially_refunded', 'refunded')
              AND o.total_minor > (SELECT coalesce(sum(p.captured_minor), 0) FROM payment AS p
                                   WHERE p.order_id = o.id)",
    },
    Check {
        name: "outbox_complete",
        promise: "each version of each order has exactly one event until its trail is forgotten",
        subject: "events",
        only: None,
        count: "SELECT count(*) FROM outbox",
        violations: "
            SELECT 'order ' || o.id || ': version ' || o.version || ', ' || count(e.seq) || ' events of '
                   || count(DISTINCT e.version) || ' versions'
            FROM orders AS o LEFT JOIN outbox AS e ON e.order_id = o.id AND e.topic LIKE 'order.%'
            GROUP BY o.id, o.version, o.created_at_ms
            HAVING count(e.seq) <> count(DISTINCT e.version)
                OR (count(e.seq) <> o.version AND NOT (
                    o.created_at_ms < coalesce(
                        (SELECT before_ms FROM retention WHERE subject = 'events'), 0)
                    AND (count(e.seq) = 0 OR (max(e.version) = o.version
                         AND min(e.version) + count(e.seq) - 1 = o.version))))",
    },
    Check {
        name: "events_delivered_or_pending",
        promise: "each event is before a sink's cursor, or pending, or a dead letter; none is missing",
        subject: "sinks",
        only: Some(Backend::Sqlite),
        count: "SELECT count(*) FROM sink",
        violations: "
            SELECT 'outbox: ' || present || ' events and ' || forgotten || ' forgotten of ' || written
            FROM (SELECT (SELECT count(*) FROM outbox) AS present,
                         coalesce((SELECT removed FROM retention WHERE subject = 'events'), 0) AS forgotten,
                         coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0) AS written)
            WHERE present + forgotten <> written
            UNION ALL
            SELECT 'sink ' || id || ': cursor ' || cursor || ' is beyond the last event'
            FROM sink WHERE cursor > coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0)",
    },
    Check {
        name: "events_delivered_or_pending",
        promise: "each event of each sink is delivered, or pending, or a dead letter; none is missing",
        subject: "sinks",
        only: Some(Backend::Postgres),
        count: "SELECT count(*) FROM sink",
        violations: "
            SELECT 'event ' || e.event_id || ' was never queued for sink ' || s.id
            FROM sink AS s JOIN outbox AS e ON (s.principal IS NULL OR s.principal = e.principal)
                AND (s.kind <> 'provider' OR e.topic IN ('payment.requested', 'refund.requested'))
            LEFT JOIN delivery AS d ON d.sink = s.id AND d.event_id = e.event_id
            WHERE d.seq IS NULL AND e.at_ms > s.created_at_ms AND s.deleted_at_ms IS NULL",
    },
    Check {
        name: "groups_conserved",
        promise: "a group's places are those of its members, and never more than its size",
        subject: "groups",
        only: None,
        count: "SELECT count(*) FROM buying_group",
        violations: "
            SELECT 'group ' || id || ': ' || state || ', size ' || size || ', taken ' || taken
                   || ' for ' || places || ', paid ' || paid || ' for ' || payers
            FROM (SELECT g.id, g.state, g.size, g.taken, g.paid,
                         (SELECT count(*) FROM group_place AS p
                          WHERE p.group_id = g.id AND p.state <> 'released') AS places,
                         (SELECT count(*) FROM group_place AS p
                          WHERE p.group_id = g.id AND p.state = 'paid') AS payers
                  FROM buying_group AS g) AS s
            WHERE taken > size OR paid > taken
               OR state <> 'failed' AND (taken <> places OR paid <> payers)
               OR state = 'succeeded' AND paid <> size",
    },
    Check {
        name: "renewals_explained",
        promise: "a member has each period once, and what was paid for is what the last one says",
        subject: "members",
        only: None,
        count: "SELECT count(*) FROM member",
        violations: "
            SELECT 'member ' || id || ': period ' || period || ', renewals ' || renewals || ', last ' || last
            FROM (SELECT m.id, m.period, m.paid_until_ms,
                         (SELECT count(*) FROM renewal AS r WHERE r.member_id = m.id) AS renewals,
                         (SELECT coalesce(max(r.paid_until_ms), 0) FROM renewal AS r
                          WHERE r.member_id = m.id) AS last
                  FROM member AS m) AS s
            WHERE period <> renewals OR paid_until_ms <> last",
    },
    Check {
        name: "references_intact",
        promise: "no row refers to a missing one",
        subject: "tables",
        only: Some(Backend::Sqlite),
        count: "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        violations: "SELECT \"table\" || ' row ' || coalesce(rowid, '?') || ' refers to a missing ' || parent
                     FROM pragma_foreign_key_check",
    },
    Check {
        name: "file_intact",
        promise: "SQLite finds no damage",
        subject: "pages",
        only: Some(Backend::Sqlite),
        count: "SELECT page_count FROM pragma_page_count",
        violations: "SELECT integrity_check FROM pragma_integrity_check WHERE integrity_check <> 'ok'",
    },
];

/// What the auditor found.
#[derive(Debug)]
pub struct Report {
    findings: Vec<Finding>,
}

#[derive(Debug)]
struct Finding {
    name: &'static str,
    promise: &'static str,
    subject: &'static str,
    checked: i64,
    violated: usize,
    shown: Vec<String>,
}

impl Report {
    /// Whether every promise was kept.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|finding| finding.violated == 0)
    }

    /// The names of broken promises.
    pub fn violated(&self) -> impl Iterator<Item = &'static str> {
        self.findings
            .iter()
            .filter(|finding| finding.violated > 0)
            .map(|finding| finding.name)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let Finding {
                name,
                promise,
                subject,
                checked,
                violated,
                shown,
            } = finding;
            let verdict = if *violated == 0 {
                "ok      "
            } else {
                "VIOLATED"
            };
            writeln!(f, "{verdict} {name}: {promise} ({checked} {subject})")?;
            for violation in shown {
                writeln!(f, "         {violation}")?;
            }
            if *violated > shown.len() {
                writeln!(f, "         {violated} violations in all")?;
            }
        }
        let broken = self.violated().count();
        writeln!(
            f,
            "{} promises checked, {broken} violated",
            self.findings.len()
        )
    }
}

/// Why nothing could be proved.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The database cannot be read, or is none.
    #[error("the database: {0}")]
    Sql(#[from] SqlError),
    /// The database has another schema than the checks.
    #[error(transparent)]
    Schema(StoreError),
    /// The database was never used by this service, or by an older version of it.
    #[error(
        "the database has schema {found}, and this audit proves {known}; serve it once to migrate"
    )]
    SchemaOld {
        /// Version in the database.
        found: u32,
        /// Version the checks are for.
        known: u32,
    },
}

/// Audits a database in one snapshot, writing nothing. It blocks.
///
/// # Errors
/// [`AuditError`] if the database cannot be read or has another schema. Broken promises are
/// not errors; they are in the report.
pub fn audit(target: &Target) -> Result<Report, AuditError> {
    let mut connection = target.open_to_read()?;
    let connection = connection.as_mut();
    connection.begin_snapshot()?;
    let (found, known) = (schema::version(connection)?, schema::VERSION);
    if found > known {
        return Err(AuditError::Schema(StoreError::SchemaTooNew {
            found,
            known,
        }));
    }
    if found < known {
        return Err(AuditError::SchemaOld { found, known });
    }
    let backend = connection.backend();
    let findings = CHECKS
        .iter()
        .filter(|check| check.only.is_none_or(|only| only == backend))
        .map(|check| run(connection, check))
        .collect::<Result<_, _>>()?;
    connection.rollback()?;
    Ok(Report { findings })
}

fn run(connection: &mut dyn Connection, check: &Check) -> Result<Finding, SqlError> {
    let mut counted = connection.query(check.count, &[])?;
    let checked = counted.pop().map_or(Ok(0), |mut row| row.take())?;
    let found = connection.query(check.violations, &[])?;
    let violated = found.len();
    let shown = found
        .into_iter()
        .take(SHOWN_MAX)
        .map(|mut row| row.take())
        .collect::<Result<_, _>>()?;
    let Check {
        name,
        promise,
        subject,
        ..
    } = *check;
    Ok(Finding {
        name,
        promise,
        subject,
        checked,
        violated,
        shown,
    })
}
