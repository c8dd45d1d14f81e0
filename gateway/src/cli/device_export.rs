//! `devices export`: every registered device as CSV, without secrets.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::Value;

use super::{Context, Failure, client::MEMORY};

/// Number of rows of one request: the API's maximum.
const PAGE_LEN: usize = 1_000;
const COLUMNS: [(&str, &str); 10] = [
    ("id", "/id"),
    ("external_id", "/external_id"),
    ("tenant", "/tenant"),
    ("model", "/model"),
    ("state", "/state"),
    ("firmware", "/firmware"),
    ("presence", "/presence/state"),
    ("since", "/presence/since"),
    ("created_at", "/created_at"),
    ("updated_at", "/updated_at"),
];

#[derive(Debug, Args)]
pub struct Export {
    /// Only devices of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Only devices of this model
    #[arg(long)]
    model: Option<String>,
    /// Only devices in this state: enabled, disabled, revoked, online, offline or unknown
    #[arg(long)]
    state: Option<String>,
    /// CSV file to write, once the export is complete [default: standard output]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub fn run(ctx: &Context, args: &Export) -> Result<(), Failure> {
    let Some(path) = &args.out else {
        return write(ctx, args, io::stdout().lock()).and_then(whole);
    };
    let unfinished = path.with_added_extension("part");
    let named = |path: &Path, error: io::Error| Failure::failed(format!("{}: {error}", path.display()));
    let file = File::create(&unfinished).map_err(|error| named(&unfinished, error))?;
    let written = write(ctx, args, file);
    if written.is_err() {
        // The first error is the reason.
        let _ = fs::remove_file(&unfinished);
    }
    let unreadable = written?;
    fs::rename(&unfinished, path).map_err(|error| named(path, error))?;
    whole(unreadable)
}

/// Fails if rows can't be read: all others were exported.
fn whole(unreadable: Vec<Value>) -> Result<(), Failure> {
    let list = serde_json::json!({ "unreadable": unreadable });
    super::devices::unreadable(&list).map_or(Ok(()), |unreadable| Err(Failure::failed(unreadable)))
}

/// Returns the devices whose rows can't be read.
fn write(ctx: &Context, args: &Export, out: impl Write) -> Result<Vec<Value>, Failure> {
    let mut lines = csv::Writer::from_writer(BufWriter::new(out));
    let failed = |error: csv::Error| Failure::from(io::Error::from(error));
    lines.write_record(COLUMNS.map(|(name, _)| name)).map_err(failed)?;
    let filters = [("tenant", &args.tenant), ("model", &args.model), ("state", &args.state)];
    let mut query: Vec<_> = filters
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.clone()?)))
        .chain([("limit", PAGE_LEN.to_string())])
        .collect();
    let mut unreadable = Vec::new();
    loop {
        let mut page = ctx.client.get("/api/v1/devices", &query)?;
        if page["source"] == MEMORY {
            return Err(Failure::failed(
                "the database does not answer, so an export would not be complete",
            ));
        }
        for device in page.get("items").and_then(Value::as_array).into_iter().flatten() {
            let cells = COLUMNS.map(|(_, path)| device.pointer(path).and_then(Value::as_str).unwrap_or_default());
            lines.write_record(cells).map_err(failed)?;
        }
        if let Some(Value::Array(ids)) = page.get_mut("unreadable").map(Value::take) {
            unreadable.extend(ids);
        }
        let Some(cursor) = page.get("next_cursor").and_then(Value::as_str) else {
            break;
        };
        query.retain(|(name, _)| *name != "cursor");
        query.push(("cursor", cursor.to_owned()));
    }
    lines.flush()?;
    Ok(unreadable)
}
