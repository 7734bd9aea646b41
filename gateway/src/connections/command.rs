//! `edgemeter connections`: asks the running gateway, prints a table.

use std::fmt::Write as _;

use anyhow::{Context as _, ensure};

use super::{Filter, view::Row};
use crate::{admin::client, config};

/// Asks the admin port, and renders what it answers: as it is, or as a table.
///
/// # Errors
/// No gateway answers there, or it is not one.
pub fn print(admin: &config::Admin, filter: &Filter, json: bool) -> anyhow::Result<String> {
    let path = format!("/connections?{}", filter.to_query());
    let (status, body) = client::ask(admin, "GET", &path)?;
    ensure!(status == 200, "{}", body.trim_end());
    if json {
        return Ok(body);
    }
    let rows: Vec<Row> = serde_json::from_str(&body).context("the answer is not a list of rows")?;
    let mut out = String::new();
    table(&mut out, &rows)?;
    Ok(out)
}

fn table(out: &mut String, rows: &[Row]) -> std::fmt::Result {
    writeln!(
        out,
        "{:<14} {:<28} {:<28} {:<10} {:>9} {:>9} {:>7} {:>11} {:>11}  owner",
        "state",
        "local",
        "remote",
        "endpoint",
        "shake us",
        "rtt us",
        "retrans",
        "acked B",
        "received B"
    )?;
    for row in rows {
        let number = |value: Option<u32>| value.map_or_else(|| "-".into(), |v| v.to_string());
        let owner = match &row.owner {
            None if row.earlier => "from before the start".to_owned(),
            None => "unknown".to_owned(),
            Some(owner) => {
                let place = owner
                    .container
                    .as_deref()
                    .map(|id| format!(" container {}", &id[..12.min(id.len())]))
                    .unwrap_or_default();
                format!("{} {} ({}){place}", owner.pid, owner.command, owner.via)
            }
        };
        let place = |text: &str| match row.namespace.as_str() {
            "" => text.to_owned(),
            namespace => format!("{namespace}/{text}"),
        };
        writeln!(
            out,
            "{:<14} {:<28} {:<28} {:<10} {:>9} {:>9} {:>7} {:>11} {:>11}  {owner}",
            row.end.as_deref().unwrap_or(&row.state),
            place(&row.local),
            row.remote,
            row.endpoint,
            number(row.handshake_us),
            number(row.srtt_us),
            row.retransmits,
            row.bytes_acked,
            row.bytes_received,
        )?;
    }
    writeln!(out, "{} connections", rows.len())
}
