//! The auditor: proves from the file alone that the service kept its promises.
//!
//! It trusts no code of the service: each `CHECKS` entry is one query that selects the
//! rows which break a promise. Everything is read in one snapshot, so a live database can
//! be audited while it serves.

use std::fmt;
use std::path::Path;

use rusqlite::Connection;

use crate::store::{self, StoreError};

/// Violations shown per check; the count is always complete.
const SHOWN_MAX: usize = 10;

/// One promise.
struct Check {
    name: &'static str,
    promise: &'static str,
    /// What is counted as checked, and the query that counts it.
    subject: &'static str,
    count: &'static str,
    /// Selects one text per violation.
    violations: &'static str,
}

const CHECKS: &[Check] = &[
    Check {
        name: "stock_conserved",
        promise: "initial = available + sold",
        subject: "SKUs",
        count: "SELECT count(*) FROM stock",
        violations: "
            SELECT 'SKU ' || sku || ': initial ' || initial || ', available ' || available || ', sold ' || sold
            FROM (SELECT sku, initial, available,
                         (SELECT coalesce(sum(quantity), 0) FROM order_line WHERE order_line.sku = stock.sku) AS sold
                  FROM stock)
            WHERE initial <> available + sold OR available < 0",
    },
    Check {
        name: "ledger_balanced",
        promise: "sum of ledger movements = available",
        subject: "movements",
        count: "SELECT count(*) FROM stock_movement",
        violations: "
            SELECT 'SKU ' || sku || ': movements sum to ' || balance || ', available ' || available
            FROM (SELECT sku, available,
                         (SELECT coalesce(sum(delta), 0) FROM stock_movement AS m WHERE m.sku = stock.sku) AS balance
                  FROM stock)
            WHERE balance <> available",
    },
    Check {
        name: "ledger_explained",
        promise: "each order line has exactly its movement, and each sale its line",
        subject: "order lines",
        count: "SELECT count(*) FROM order_line",
        violations: "
            SELECT 'order ' || coalesce(l.order_id, m.order_id, 'none') || ' SKU ' || coalesce(l.sku, m.sku)
                   || ': line ' || coalesce(l.quantity, 0) || ', movements ' || coalesce(m.delta, 0)
                   || ' in ' || coalesce(m.entries, 0)
            FROM order_line AS l
            FULL JOIN (SELECT order_id, sku, sum(delta) AS delta, count(*) AS entries
                       FROM stock_movement WHERE reason = 'sale' GROUP BY order_id, sku) AS m
                   ON m.order_id = l.order_id AND m.sku = l.sku
            WHERE l.quantity IS NULL OR m.delta IS NULL OR m.delta <> -l.quantity OR m.entries <> 1",
    },
    Check {
        name: "one_order_per_key",
        promise: "each order has exactly one idempotency key, and each created answer its order",
        subject: "keys",
        count: "SELECT count(*) FROM idempotency",
        violations: "
            SELECT 'order ' || o.id || ': ' || count(i.key) || ' keys'
            FROM orders AS o LEFT JOIN idempotency AS i ON i.order_id = o.id
            GROUP BY o.id HAVING count(i.key) <> 1
            UNION ALL
            SELECT 'key ' || i.principal || '/' || i.route || '/' || i.key || ': status ' || i.status
                   || ', order ' || coalesce(i.order_id, 'none')
            FROM idempotency AS i LEFT JOIN orders AS o ON o.id = i.order_id AND o.principal = i.principal
            WHERE (i.status = 201) <> (o.id IS NOT NULL)",
    },
    Check {
        name: "order_totals",
        promise: "line total = unit price * quantity, order total = sum of lines",
        subject: "orders",
        count: "SELECT count(*) FROM orders",
        violations: "
            SELECT 'order ' || order_id || ' SKU ' || sku || ': ' || quantity || ' at ' || unit_price_minor
                   || ' is not ' || total_minor
            FROM order_line WHERE total_minor <> unit_price_minor * quantity
            UNION ALL
            SELECT 'order ' || o.id || ': total ' || o.total_minor || ', lines ' || coalesce(sum(l.total_minor), 'none')
            FROM orders AS o LEFT JOIN order_line AS l ON l.order_id = o.id
            GROUP BY o.id HAVING count(l.sku) = 0 OR sum(l.total_minor) <> o.total_minor",
    },
    Check {
        name: "outbox_complete",
        promise: "each order has exactly one order.placed event",
        subject: "events",
        count: "SELECT count(*) FROM outbox",
        violations: "
            SELECT 'order ' || o.id || ': ' || count(e.seq) || ' events'
            FROM orders AS o LEFT JOIN outbox AS e ON e.order_id = o.id AND e.topic = 'order.placed'
            GROUP BY o.id HAVING count(e.seq) <> 1",
    },
    Check {
        name: "references_intact",
        promise: "no row refers to a missing one",
        subject: "tables",
        count: "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
        violations: "SELECT \"table\" || ' row ' || coalesce(rowid, '?') || ' refers to a missing ' || parent
                     FROM pragma_foreign_key_check",
    },
    Check {
        name: "file_intact",
        promise: "SQLite finds no damage",
        subject: "pages",
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
    /// The file cannot be read, or is no database.
    #[error("the database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file has another schema than the checks.
    #[error(transparent)]
    Schema(StoreError),
    /// The file was never used by this service, or by an older version of it.
    #[error(
        "the database has schema {found}, and this audit proves {known}; serve it once to migrate"
    )]
    SchemaOld {
        /// Version in the file.
        found: u32,
        /// Version the checks are for.
        known: u32,
    },
}

/// Audits a database file, read-only and in one snapshot.
///
/// # Errors
/// [`AuditError`] if the file cannot be read or has another schema. Broken promises are not
/// errors; they are in the report.
pub fn audit(path: &Path) -> Result<Report, AuditError> {
    let connection = store::open_to_read(path)?;
    let snapshot = connection.unchecked_transaction()?;
    let (found, known) = (store::schema_version(&snapshot)?, store::SCHEMA_VERSION);
    if found > known {
        return Err(AuditError::Schema(StoreError::SchemaTooNew {
            found,
            known,
        }));
    }
    if found < known {
        return Err(AuditError::SchemaOld { found, known });
    }
    let findings = CHECKS
        .iter()
        .map(|check| run(&snapshot, check))
        .collect::<Result<_, _>>()?;
    Ok(Report { findings })
}

fn run(connection: &Connection, check: &Check) -> rusqlite::Result<Finding> {
    let checked = connection.query_row(check.count, [], |row| row.get(0))?;
    let mut statement = connection.prepare(check.violations)?;
    let mut rows = statement.query([])?;
    let (mut violated, mut shown) = (0_usize, Vec::new());
    while let Some(row) = rows.next()? {
        violated = violated.saturating_add(1);
        if shown.len() < SHOWN_MAX {
            shown.push(row.get(0)?);
        }
    }
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
