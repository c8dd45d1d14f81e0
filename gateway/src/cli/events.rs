//! `seawall events`: the events of a gateway, live.

use std::{
    io::{BufRead, BufReader, Read},
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum};
use serde_json::Value;

use super::{Context, Failure, devices::Name, note, table};

/// Maximum length of a line of the stream, in bytes. A device's message is far below it.
const LINE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Wait before a lost stream is reopened. Doubled after each failure.
const RETRY_WAIT_MIN: Duration = Duration::from_secs(1);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
pub struct Events {
    // The only value, kept for command lines that have it.
    #[arg(default_value = "follow", hide = true)]
    verb: EventsVerb,
    /// End after this number of events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Begin after the event with this id, a number
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64))]
    after: Option<u64>,
    /// Only events with these names, as in presence,alarm
    #[arg(long = "type", value_name = "NAMES")]
    types: Option<String>,
    /// Only events of this device
    #[arg(long, value_name = "ID")]
    device: Option<Name>,
    /// Only events of devices of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Only events of devices with a version of this range, as in '>=3.8.0-b3'
    #[arg(long)]
    firmware: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EventsVerb {
    /// Print events until Ctrl-C
    Follow,
}

/// Name of what stands for events that have left the buffer. It does not count as an event.
const MISSED: &str = "missed";

/// One event of the stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Event {
    id: Option<String>,
    name: String,
    data: String,
}

pub fn run(ctx: &Context, args: &Events) -> Result<(), Failure> {
    let EventsVerb::Follow = args.verb;
    let mut last = args.after.map(|id| id.to_string());
    let mut left = args.count;
    let filters = [
        ("type", args.types.as_deref()),
        ("device", args.device.as_ref().map(Name::as_str)),
        ("tenant", args.tenant.as_deref()),
        ("firmware", args.firmware.as_deref()),
    ];
    let query: Vec<_> = filters
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect();
    let mut stream = ctx.client.stream("/api/v1/events", &query, last.as_deref())?;
    let mut wait = RETRY_WAIT_MIN;
    while left != Some(0) {
        match next(&mut stream) {
            Ok(Some(event)) => {
                wait = RETRY_WAIT_MIN;
                last = event.id.clone().or(last);
                if event.name != MISSED {
                    left = left.map(|left| left - 1);
                }
                table::print(&shown(ctx, &event))?;
            }
            Ok(None) | Err(_) => {
                note(&format!("the stream of {} ended; trying again", ctx.client.base()));
                stream = loop {
                    thread::sleep(wait);
                    wait = (wait * 2).min(RETRY_WAIT_MAX);
                    match ctx.client.stream("/api/v1/events", &query, last.as_deref()) {
                        Ok(stream) => break stream,
                        Err(Failure::Unreachable(_)) => {}
                        Err(refusal) => return Err(refusal),
                    }
                };
            }
        }
    }
    Ok(())
}

fn shown(ctx: &Context, event: &Event) -> String {
    let data: Value = serde_json::from_str(&event.data).unwrap_or_else(|_| Value::String(event.data.clone()));
    if ctx.json {
        let line = serde_json::json!({"id": event.id, "event": event.name, "data": data}).to_string();
        return table::escape_json(&line) + "\n";
    }
    let facts = data
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != "at" && *key != "type");
    let facts: Vec<String> = facts
        .map(|(key, value)| format!("{}={}", table::text(key), table::cell(value)))
        .collect();
    let facts = if data.is_object() {
        facts.join(" ")
    } else {
        table::cell(&data)
    };
    format!("{}  {:10}  {facts}\n", table::at(&data, "at"), table::text(&event.name))
}

/// Reads the next server-sent event; `None` at the end of the stream.
fn next(stream: &mut BufReader<impl Read>) -> std::io::Result<Option<Event>> {
    let mut event = Event::default();
    loop {
        let mut line = String::new();
        if stream.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end_matches(['\n', '\r']);
        if line.is_empty() {
            if event.data.is_empty() {
                event = Event::default();
                continue;
            }
            return Ok(Some(event));
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => event.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut event.name),
            "data" => {
                if !event.data.is_empty() {
                    event.data.push('\n');
                }
                event.data.push_str(value);
            }
            // Comments keep the connection alive. Other fields are not used.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_across_comments_and_lines() {
        let bytes = b": hello\n\nid: 7\nevent: rule\ndata: {\"a\":\ndata: 1}\n\nid: 8\n\n";
        let mut stream = BufReader::new(&bytes[..]);

        let first = next(&mut stream).unwrap().unwrap();

        assert_eq!(
            first,
            Event {
                id: Some("7".into()),
                name: "rule".into(),
                data: "{\"a\":\n1}".into()
            }
        );
        assert_eq!(next(&mut stream).unwrap(), None);
    }
}
