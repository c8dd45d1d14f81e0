//! `seawall devices`: the registry, and the state of its devices.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Subcommand;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use seawall_proto::id::{DeviceId, Label};
use serde_json::{Map, Value, json};

use super::{
    Common, Context, Failure,
    client::{Answer, MEMORY, Method},
    device_change::{self, Ids},
    device_export, note, seed, table, time,
};

/// Maximum number of rows of a list.
const LIST_MAX: usize = 1_000_000;
/// Maximum number of bad lines that are shown. The API reports no more.
const BAD_LINES_SHOWN: usize = 100;

/// Maximum number of devices that a warning names.
const UNREADABLE_NAMED_MAX: usize = 20;

/// Bytes that are not escaped in a segment of a path.
const NON_ALPHANUMERIC_BUT_DASH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

const COLUMNS: [(&str, &str); 8] = [
    ("ID", "id"),
    ("TENANT", "tenant"),
    ("MODEL", "model"),
    ("FIRMWARE", "firmware"),
    ("STATE", "state"),
    ("PRESENCE", "presence.state"),
    ("SINCE", "presence.since"),
    ("EXTERNAL ID", "external_id"),
];

const HISTORY_COLUMNS: [(&str, &str); 5] = [
    ("AT", "at"),
    ("STATE", "state"),
    ("REASON", "reason"),
    ("EVIDENCE", "evidence"),
    ("EPOCH", "epoch"),
];

/// A device's id: its UUID, or with `identity.namespace` a name of at most 64 bytes of printable ASCII.
#[derive(Clone, Debug)]
pub struct Name(String);

impl FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if let Ok(id) = text.parse::<DeviceId>() {
            return Ok(Self(id.to_string()));
        }
        match Label::parse(text) {
            Ok(Some(name)) => Ok(Self(name.to_string())),
            Ok(None) | Err(_) => Err("expected a UUID, or a name of 1 to 64 bytes of printable ASCII"),
        }
    }
}

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Subcommand)]
pub enum Devices {
    /// Registered devices
    List {
        /// Only devices of this tenant
        #[arg(long)]
        tenant: Option<String>,
        /// Only devices of this model
        #[arg(long)]
        model: Option<String>,
        /// Only devices that connected last with a version of this range, as in '>=3.8.0-b3'
        #[arg(long)]
        firmware: Option<String>,
        /// Only devices in this state: enabled, disabled, revoked, online, offline or unknown
        #[arg(long)]
        state: Option<String>,
        /// Maximum number of rows to show
        #[arg(long, default_value_t = 100, value_parser = rows)]
        limit: usize,
        /// Show all rows, up to 1,000,000
        #[arg(long, conflicts_with = "limit")]
        all: bool,
        /// Cursor of the next page, as the previous list shows it
        #[arg(long)]
        cursor: Option<String>,
    },
    /// One device, with its last connection attempts
    Show {
        /// Id of the device
        id: Name,
    },
    /// Changes of a device's presence, newest first
    History {
        /// Id of the device
        id: Name,
        /// Maximum number of rows to show
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
        /// Show the page that begins there
        #[arg(long)]
        cursor: Option<String>,
    },
    /// Register a device; its secret is shown this once
    Add {
        /// Id of the device [default: random]
        id: Option<Name>,
        /// Tenant of the device [default: default]
        #[arg(long)]
        tenant: Option<String>,
        /// Model of the device [default: none]
        #[arg(long)]
        model: Option<String>,
    },
    /// Change the tenant or the model of a device; a live session keeps the old ones
    Update {
        /// Id of the device
        id: Name,
        /// New tenant
        #[arg(long)]
        tenant: Option<String>,
        /// New model; empty: none
        #[arg(long)]
        model: Option<String>,
    },
    /// Register the devices of a CSV file, all of them or none: id, secret or secret_sha256, tenant, model
    Import {
        /// The file; `-`: standard input
        file: PathBuf,
        /// Give registered devices the file's credential, and its name if they have none
        #[arg(long)]
        update: bool,
    },
    /// Create devices with random secrets: write them to a file for `devices import` and firmware-sim, and register
    /// them
    Seed(seed::Seed),
    /// Write all registered devices as CSV, without secrets: a list for reports, not a backup
    Export(device_export::Export),
    /// Let disabled devices connect again
    Enable {
        #[command(flatten)]
        ids: Ids,
        /// Also enable revoked devices
        #[arg(long)]
        revoked: bool,
    },
    /// Refuse devices for now, and close their sessions; they try again every 15 to 30 minutes
    Disable {
        #[command(flatten)]
        ids: Ids,
        /// Do not ask: needed for more than 20 devices, and for ids from standard input
        #[arg(long)]
        yes: bool,
    },
    /// Refuse devices for good, and close their sessions; they do not try again
    Revoke {
        #[command(flatten)]
        ids: Ids,
        /// Do not ask: needed for more than 20 devices, and for ids from standard input
        #[arg(long)]
        yes: bool,
    },
    /// Give a device a new secret, which is shown this once
    Rotate {
        /// Id of the device
        id: Name,
        /// Time for which the old secret stays valid, as in 24h [default: it ends at once, with the session that uses
        /// it]
        #[arg(long, value_name = "SPAN", value_parser = time::span)]
        overlap: Option<String>,
    },
    /// Remove devices from the registry, and close their sessions; asks first on a terminal
    Delete {
        #[command(flatten)]
        ids: Ids,
        /// Do not ask: needed for more than 20 devices, and for ids from standard input
        #[arg(long)]
        yes: bool,
    },
    /// Close the sessions of devices; the devices reconnect
    Disconnect {
        #[command(flatten)]
        ids: Ids,
    },
    /// Send a device a message
    Send {
        /// Id of the device
        id: Name,
        /// JSON; anything else is sent as text
        #[arg(required_unless_present = "binary")]
        payload: Option<String>,
        /// A file to send as one binary frame of a plain session; `-`: standard input
        #[arg(long, value_name = "FILE", conflicts_with = "payload")]
        binary: Option<PathBuf>,
    },
}

pub fn run(common: &Common, verb: Devices) -> Result<(), Failure> {
    let ctx = Context::new(common)?;
    match verb {
        Devices::List {
            tenant,
            model,
            firmware,
            state,
            limit,
            all,
            cursor,
        } => {
            let filters = [
                ("tenant", tenant),
                ("model", model),
                ("firmware", firmware),
                ("state", state),
                ("cursor", cursor),
            ];
            let query: Vec<_> = filters
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?)))
                .collect();
            list(&ctx, &query, if all { LIST_MAX } else { limit })
        }
        Devices::Show { id } => {
            let device = ctx.client.get(&path(&id), &[])?;
            warn_of_memory(&device);
            ctx.show(&device, shown)
        }
        Devices::History { id, limit, cursor } => {
            let mut query = vec![("limit", limit.to_string())];
            query.extend(cursor.map(|cursor| ("cursor", cursor)));
            let answer = ctx.client.get(&format!("{}/history", path(&id)), &query)?;
            if answer["source"] == MEMORY {
                note(
                    "warning: the database does not answer. These are the newest changes only, from the memory of one node",
                );
            }
            ctx.show(&answer, |answer| table::items(answer, &HISTORY_COLUMNS))?;
            ctx.note_next_page(&answer);
            Ok(())
        }
        Devices::Add { id, tenant, model } => add(&ctx, id.as_ref(), tenant, model),
        Devices::Import { file, update } => import(&ctx, &file, update),
        Devices::Seed(args) => seed::run(&ctx, &args),
        Devices::Update { id, tenant, model } => update(&ctx, &id, tenant, model),
        Devices::Export(args) => device_export::run(&ctx, &args),
        Devices::Enable { ids, revoked } => device_change::enable(&ctx, ids, revoked),
        Devices::Disable { ids, yes } => device_change::disable(&ctx, ids, yes),
        Devices::Revoke { ids, yes } => device_change::revoke(&ctx, ids, yes),
        Devices::Rotate { id, overlap } => {
            let body = overlap.map_or_else(|| json!({}), |overlap| json!({"overlap": overlap}));
            let answer = ctx
                .client
                .send(Method::Post, &format!("{}/secret", path(&id)), Some(&body))?;
            ctx.show(&answer, |answer| shown_rotation(&id, answer))
        }
        Devices::Delete { ids, yes } => device_change::delete(&ctx, ids, yes),
        Devices::Disconnect { ids } => device_change::disconnect(&ctx, ids),
        Devices::Send { id, payload, binary } => send(&ctx, &id, payload, binary.as_deref()),
    }
}

/// Returns the API path of a device.
pub fn path(id: &Name) -> String {
    format!(
        "/api/v1/devices/{}",
        utf8_percent_encode(&id.0, NON_ALPHANUMERIC_BUT_DASH)
    )
}

fn rows(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(rows @ 1..=LIST_MAX) => Ok(rows),
        Ok(_) | Err(_) => Err(format!("expected 1 to {LIST_MAX}")),
    }
}

/// Tells people that an answer is from memory.
fn warn_of_memory(answer: &Value) {
    if answer["source"] == MEMORY {
        note(
            "warning: the database does not answer. This comes from the memory of one node: it is not complete, and has devices \
             with a session since its start only",
        );
    }
}

fn list(ctx: &Context, query: &[(&str, String)], limit: usize) -> Result<(), Failure> {
    let answer = ctx.client.list("/api/v1/devices", query, limit)?;
    warn_of_memory(&answer);
    ctx.show(&answer, |answer| table::items(answer, &COLUMNS))?;
    if let Some(unreadable) = unreadable(&answer) {
        note(&format!("warning: {unreadable}"));
    }
    ctx.note_next_page(&answer);
    Ok(())
}

/// Names the devices of a list whose rows can't be read. `None` if there are none.
pub fn unreadable(list: &Value) -> Option<String> {
    let ids = list
        .get("unreadable")
        .and_then(Value::as_array)
        .filter(|ids| !ids.is_empty())?;
    let named: Vec<&str> = ids
        .iter()
        .take(UNREADABLE_NAMED_MAX)
        .filter_map(Value::as_str)
        .collect();
    let more = if ids.len() > named.len() { ", …" } else { "" };
    Some(format!(
        "the rows of {} devices can't be read, so they are not in the list: {}{more}. `seawall alarms` says why",
        ids.len(),
        named.join(", ")
    ))
}

fn shown(device: &Value) -> String {
    let mut lines = table::facts(&[
        ("id", table::at(device, "id")),
        ("external id", table::at(device, "external_id")),
        ("tenant", table::at(device, "tenant")),
        ("model", table::at(device, "model")),
        ("firmware", table::at(device, "firmware")),
        ("state", table::at(device, "state")),
        ("presence", table::at(device, "presence.state")),
        ("since", table::at(device, "presence.since")),
        ("as of", table::at(device, "presence.as_of")),
        ("node", table::at(device, "presence.node")),
        ("reason", table::at(device, "presence.reason")),
        ("cause", table::at(device, "presence.cause")),
        ("evidence", table::at(device, "presence.evidence")),
        ("old secret until", table::at(device, "previous_secret_until")),
        ("created", table::at(device, "created_at")),
        ("updated", table::at(device, "updated_at")),
        ("source", table::at(device, "source")),
    ]);
    lines.push_str("\nlast connection attempts\n");
    let attempts = device.get("attempts").unwrap_or(&Value::Null);
    lines.push_str(&table::items(attempts, &[("AT", "at"), ("OUTCOME", "outcome")]));
    lines
}

fn add(ctx: &Context, id: Option<&Name>, tenant: Option<String>, model: Option<String>) -> Result<(), Failure> {
    let id = id.map_or_else(|| uuid::Uuid::new_v4().to_string(), Name::to_string);
    let mut body = Map::new();
    body.insert("id".into(), id.clone().into());
    for (key, value) in [("tenant", tenant), ("model", model)] {
        if let Some(value) = value {
            body.insert(key.into(), value.into());
        }
    }
    let answer = ctx.client.send(Method::Post, "/api/v1/devices", Some(&body.into()))?;
    ctx.show(&answer, |answer| shown_secret(&id, answer))
}

fn shown_secret(id: &str, answer: &Value) -> String {
    table::facts(&[("id", id.to_owned()), ("secret", table::at(answer, "secret"))])
}

fn shown_rotation(id: &Name, answer: &Value) -> String {
    let mut lines = shown_secret(id.as_str(), answer);
    match answer.get("previous_secret_until").and_then(Value::as_str) {
        Some(until) => lines.push_str(&format!("the old secret is valid until {}\n", table::text(until))),
        None => lines.push_str("the old secret is not valid any more, and a session that used it is closed\n"),
    }
    if let Some(until) = answer.get("ended_overlap_until").and_then(Value::as_str) {
        lines.push_str(&format!(
            "the secret before the old one was valid until {}: it is not valid any more\n",
            table::text(until)
        ));
    }
    lines
}

fn update(ctx: &Context, id: &Name, tenant: Option<String>, model: Option<String>) -> Result<(), Failure> {
    let mut body = Map::new();
    if let Some(tenant) = tenant {
        body.insert("tenant".into(), tenant.into());
    }
    if let Some(model) = model {
        let model = if model.is_empty() { Value::Null } else { model.into() };
        body.insert("model".into(), model);
    }
    if body.is_empty() {
        return Err(Failure::WrongUse("devices update: give --tenant or --model".into()));
    }
    let answer = ctx.client.send(Method::Patch, &path(id), Some(&body.into()))?;
    ctx.show(&answer, |answer| {
        let (tenant, model) = (table::at(answer, "tenant"), table::at(answer, "model"));
        format!("updated {id}: tenant {tenant}, model {model}\n")
    })
}

fn import(ctx: &Context, file: &Path, update: bool) -> Result<(), Failure> {
    let answer = if file.as_os_str() == "-" {
        upload(ctx, &mut io::stdin().lock(), update)?
    } else {
        let mut opened = File::open(file).map_err(|error| Failure::failed(format!("{}: {error}", file.display())))?;
        upload(ctx, &mut opened, update)?
    };
    let report = accepted(ctx, answer)?;
    ctx.show(&report, shown_import)
}

/// Streams a CSV file to the API.
pub fn upload(ctx: &Context, lines: &mut dyn Read, update: bool) -> Result<Answer, Failure> {
    let path = if update {
        "/api/v1/devices/import?update=true"
    } else {
        "/api/v1/devices/import"
    };
    ctx.client.upload(path, "text/csv", lines)
}

/// Prints the result of an import. Bad lines go to standard error; with `--json` they are part of the error.
pub fn accepted(ctx: &Context, answer: Answer) -> Result<Value, Failure> {
    let bad_lines = match ctx.json {
        true => &[],
        false => answer.body.get("bad_lines").map(table::list).unwrap_or_default(),
    };
    for line in bad_lines.iter().take(BAD_LINES_SHOWN) {
        note(&format!(
            "line {}: {}",
            table::at(line, "number"),
            table::at(line, "reason")
        ));
    }
    answer.ok()
}

/// Returns one line of counts.
pub fn shown_import(report: &Value) -> String {
    let counts = ["added", "updated", "skipped"].map(|key| format!("{key} {}", table::at(report, key)));
    format!("{}\n", counts.join(", "))
}

fn send(ctx: &Context, id: &Name, payload: Option<String>, binary: Option<&Path>) -> Result<(), Failure> {
    let body = match (payload, binary) {
        (Some(text), _) => {
            json!({"payload": serde_json::from_str(&text).unwrap_or(Value::String(text))})
        }
        (None, Some(file)) => {
            let mut bytes = Vec::new();
            let read = if file.as_os_str() == "-" {
                io::stdin().read_to_end(&mut bytes)
            } else {
                File::open(file).and_then(|mut opened| opened.read_to_end(&mut bytes))
            };
            read.map_err(|error| Failure::failed(format!("{}: {error}", file.display())))?;
            json!({"payload_base64": STANDARD.encode(bytes)})
        }
        (None, None) => return Err(Failure::WrongUse("devices send: give a payload".into())),
    };
    let answer = ctx
        .client
        .send(Method::Post, &format!("{}/messages", path(id)), Some(&body))?;
    ctx.show(&answer, |answer| {
        format!("{} {}\n", table::at(answer, "state"), table::at(answer, "id"))
    })
}
