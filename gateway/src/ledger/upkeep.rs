//! `edgemeter ledger check | export | restore`: for the operator, while the gateway is stopped or
//! (check, export) while it serves.
//!
//! An export is text, one JSON value a line, the same from both backends: so a restore also moves
//! a ledger from a file into PostgreSQL. The last line counts the others: a cut-off file is
//! refused.

use std::{
    fmt::Write as _,
    io::{BufRead, Write},
};

use serde_json::{Value as Json, json};

use super::{
    Ledger, LedgerError,
    sql::{Fault, SqlError, Value},
};

/// Tables in the order they are written and read, with how many columns each has.
const TABLES: [(&str, usize); 12] = [
    ("gateway", 2),
    ("owner", 9),
    ("class", 3),
    ("epoch", 4),
    ("account_mark", 6),
    ("cell_mark", 4),
    ("posting", 13),
    ("cell_posting", 8),
    ("usage_sink", 5),
    ("usage_open", 8),
    ("usage_event", 14),
    ("usage_acknowledged", 7),
];
/// First line of an export.
const FORMAT: &str = "edgemeter ledger export 1";

/// Why an export or a restore did not work.
#[derive(Debug, thiserror::Error)]
pub enum UpkeepError {
    /// The ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The file.
    #[error("the export: {0}")]
    File(#[from] std::io::Error),
    /// What is in the file.
    #[error("the export, line {line}: {what}")]
    Content {
        /// From 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

/// A report on a ledger that could be opened (which found no damage in the file), and whether
/// every invariant holds.
///
/// # Errors
/// The ledger cannot be read.
pub fn check(ledger: &Ledger) -> Result<(String, bool), LedgerError> {
    let breaches = ledger.breaches()?;
    let balances = ledger.balances()?;
    let mut out = String::new();
    let _ = writeln!(out, "{}: readable, no damage found", ledger.place());
    for (interface, balance) in balances.by_interface() {
        let _ = writeln!(
            out,
            "{interface}: owners {} B + cells {} B; total {} B; difference {} B",
            balance.owned,
            balance.cells,
            balance.total,
            balance.difference()
        );
    }
    for breach in &breaches {
        let _ = writeln!(out, "BREACH {breach}");
    }
    let verdict = if breaches.is_empty() {
        "every invariant holds".to_owned()
    } else {
        format!("{} invariants do not hold", breaches.len())
    };
    let _ = writeln!(out, "{verdict}");
    Ok((out, breaches.is_empty()))
}

/// Writes every row as of one moment; how many.
///
/// # Errors
/// The ledger cannot be read or the file not written.
pub fn export(ledger: &Ledger, out: &mut dyn Write) -> Result<usize, UpkeepError> {
    let tables: Vec<(&str, Vec<super::sql::Row>)> = ledger.read(|statements| {
        TABLES
            .iter()
            .map(|(table, _)| {
                Ok((
                    *table,
                    statements.query(&format!("SELECT * FROM {table}"), &[])?,
                ))
            })
            .collect::<Result<_, SqlError>>()
    })?;
    writeln!(out, "{}", json!(FORMAT))?;
    let mut count = 0;
    for (table, rows) in tables {
        for row in rows {
            let mut line = vec![json!(table)];
            line.extend(row.0.iter().map(to_json));
            writeln!(out, "{}", Json::Array(line))?;
            count += 1;
        }
    }
    writeln!(out, "{}", json!({ "rows": count }))?;
    out.flush()?;
    Ok(count)
}

/// Fills an empty ledger from an export, in one transaction; how many rows.
///
/// What the sinks were sent after the export was made is not known any more: the next postings
/// are held in doubt for a person to decide about.
///
/// # Errors
/// The file is not a whole export, or the ledger is not empty; the ledger is as before.
pub fn restore(ledger: &Ledger, from: &mut dyn BufRead) -> Result<usize, UpkeepError> {
    let mut rows: Vec<(&'static str, Vec<Value>)> = Vec::new();
    let mut complete = false;
    for (index, line) in from.lines().enumerate() {
        let number = index + 1;
        let fail = |what: &str| UpkeepError::Content {
            line: number,
            what: what.to_owned(),
        };
        let value: Json = serde_json::from_str(&line?).map_err(|e| fail(&e.to_string()))?;
        if complete {
            return Err(fail("there is something after the last line"));
        }
        match value {
            Json::String(format) if number == 1 && format == FORMAT => {}
            _ if number == 1 => return Err(fail("this is no ledger export of this version")),
            Json::Object(end) => {
                let counted = end.get("rows").and_then(Json::as_u64);
                if counted != u64::try_from(rows.len()).ok() {
                    return Err(fail("lines are missing"));
                }
                complete = true;
            }
            Json::Array(row) => rows.push(from_json(&row).ok_or_else(|| fail("not a row"))?),
            _ => return Err(fail("not a row")),
        }
    }
    if !complete {
        return Err(UpkeepError::Content {
            line: rows.len() + 2,
            what: "the end is missing: the file is cut off".into(),
        });
    }
    ledger.write(|statements| {
        let used = statements.one("SELECT COUNT(*) FROM epoch", &[])?;
        if used.map_or(Ok(0), |row| row.int(0))? > 0 {
            return Err(SqlError::new(
                Fault::Other,
                "it is not empty; fix: restore into a new one, and keep this one aside",
            ));
        }
        statements.execute("DELETE FROM gateway", &[])?;
        statements.execute("DELETE FROM owner", &[])?;
        for (table, row) in &rows {
            let places = (1..=row.len()).map(|n| format!("?{n}"));
            let places = places.collect::<Vec<_>>().join(", ");
            statements.execute(&format!("INSERT INTO {table} VALUES ({places})"), row)?;
        }
        statements.execute("UPDATE usage_sink SET restored = 1", &[])?;
        // A batch that was under way may have arrived since.
        statements.execute(
            "UPDATE usage_event SET state = 3, note = 'restored while it was under way'
             WHERE state IN (0, 1)",
            &[],
        )?;
        Ok(())
    })?;
    Ok(rows.len())
}

fn to_json(value: &Value) -> Json {
    match value {
        // Text: a reader with floats would lose digits.
        Value::Int(number) => json!({ "i": number.to_string() }),
        Value::Text(text) => json!(text),
        Value::Blob(bytes) => {
            let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            json!({ "x": hex })
        }
        Value::Null => Json::Null,
    }
}

fn from_json(row: &[Json]) -> Option<(&'static str, Vec<Value>)> {
    let (table, columns) = row.split_first()?;
    let (table, width) = TABLES.iter().find(|(name, _)| table == name)?;
    let values: Option<Vec<Value>> = columns.iter().map(value_from_json).collect();
    values
        .filter(|values| values.len() == *width)
        .map(|values| (*table, values))
}

fn value_from_json(json: &Json) -> Option<Value> {
    match json {
        Json::String(text) => Some(Value::Text(text.clone())),
        Json::Object(tagged) => {
            if let Some(number) = tagged.get("i") {
                return number.as_str()?.parse().ok().map(Value::Int);
            }
            let hex = tagged.get("x")?.as_str()?;
            let byte = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
            let bytes: Option<Vec<u8>> = (0..hex.len()).step_by(2).map(byte).collect();
            bytes.map(Value::Blob)
        }
        _ => None,
    }
}
