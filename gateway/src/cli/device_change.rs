//! Changes of one device or several: `devices enable`, `disable`, `revoke`, `disconnect` and `delete`.

use std::io::{self, BufRead, IsTerminal};

use clap::Args;
use serde_json::{Value, json};

use super::{
    Context, Failure,
    client::Method,
    devices::{Name, path},
    note, table,
};
use crate::ops::csv_text::Decoder;

/// Maximum number of devices that are disabled or revoked without `--yes`.
const UNCONFIRMED_MAX: usize = 20;

/// The devices of a command.
#[derive(Debug, Args)]
pub struct Ids {
    /// Ids of the devices; `-` reads ids from standard input, one per line
    #[arg(required = true, value_name = "ID")]
    ids: Vec<Name>,
}

/// The devices of a command, and whether standard input named them.
struct Given {
    names: Vec<Name>,
    is_from_input: bool,
}

impl Ids {
    /// Returns the ids, including those of standard input.
    fn read(self) -> Result<Given, Failure> {
        let mut given = Given {
            names: Vec::new(),
            is_from_input: false,
        };
        for id in self.ids {
            if id.as_str() == "-" {
                given.names.extend(lines(io::stdin().lock())?);
                given.is_from_input = true;
            } else {
                given.names.push(id);
            }
        }
        if given.names.is_empty() {
            return Err(Failure::WrongUse("standard input has no ids".into()));
        }
        Ok(given)
    }
}

impl Given {
    /// Asks a person, if there is one. A list is never taken without a confirmation: it may be another list than it was
    /// meant to be.
    fn confirm(&self, ctx: &Context, question: &Question, is_confirmed: bool) -> Result<(), Failure> {
        let can_ask = !self.is_from_input && io::stdin().is_terminal() && io::stderr().is_terminal();
        let is_list = self.is_from_input || self.names.len() > UNCONFIRMED_MAX;
        if is_confirmed || !(is_list || question.is_always_asked && can_ask) {
            return Ok(());
        }
        let (verb, effect) = (question.verb, question.effect);
        let devices = match self.names.as_slice() {
            [id] => format!("device {id}"),
            several => format!("{} devices", several.len()),
        };
        // A hint at the size of the change: without it the question is the same.
        let connected = ctx.client.get("/api/v1/node", &[]).ok();
        let connected = connected.map_or_else(String::new, |node| {
            format!(" ({} devices are connected)", table::at(&node, "sessions"))
        });
        if !can_ask {
            return Err(Failure::WrongUse(format!(
                "{verb} {devices}{connected}? {effect} Nothing was changed: repeat with --yes if that is intended"
            )));
        }
        note(&format!("{verb} {devices}{connected}? {effect} Type yes to continue:"));
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if is_yes(&answer) {
            Ok(())
        } else {
            Err(Failure::failed("nothing was changed"))
        }
    }
}

/// What a person is asked before a change.
struct Question {
    verb: &'static str,
    effect: &'static str,
    /// Asked on a terminal for a single device as well.
    is_always_asked: bool,
}

/// One id per line; empty lines are skipped, and so is the heading of a CSV column. A file of Windows may be UTF-16.
fn lines(mut input: impl BufRead) -> Result<Vec<Name>, Failure> {
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes)?;
    let mut decoder = Decoder::default();
    let mut text = decoder.feed(&bytes).into_owned();
    text.extend(decoder.finish());
    let text = String::from_utf8(text).map_err(|_| Failure::WrongUse("standard input is not text".into()))?;
    let mut names = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let is_heading = number == 0 && line == "id";
        if !line.is_empty() && !is_heading {
            let name = line
                .parse()
                .map_err(|problem| Failure::WrongUse(format!("standard input: {line:?}: {problem}")))?;
            names.push(name);
        }
    }
    Ok(names)
}

/// `devices enable`. A revoked device stays revoked unless `may_unrevoke`.
pub fn enable(ctx: &Context, ids: Ids, may_unrevoke: bool) -> Result<(), Failure> {
    set_state(ctx, &ids.read()?, "enabled", may_unrevoke)
}

/// `devices disable`. A revoked device stays revoked.
pub fn disable(ctx: &Context, ids: Ids, is_confirmed: bool) -> Result<(), Failure> {
    let given = ids.read()?;
    let question = Question {
        verb: "Disable",
        effect: "A disabled device is refused, and its session ends.",
        is_always_asked: false,
    };
    given.confirm(ctx, &question, is_confirmed)?;
    set_state(ctx, &given, "disabled", false)
}

/// `devices revoke`.
pub fn revoke(ctx: &Context, ids: Ids, is_confirmed: bool) -> Result<(), Failure> {
    let given = ids.read()?;
    let question = Question {
        verb: "Revoke",
        effect: "A revoked device is told never to connect again.",
        is_always_asked: false,
    };
    given.confirm(ctx, &question, is_confirmed)?;
    set_state(ctx, &given, "revoked", true)
}

fn set_state(ctx: &Context, given: &Given, state: &'static str, may_unrevoke: bool) -> Result<(), Failure> {
    each(ctx, &given.names, state, |id| {
        if !may_unrevoke && ctx.client.get(&path(id), &[])?["state"] == "revoked" {
            return Err(Failure::failed(format!(
                "device {id} is revoked. Nothing was changed: seawall devices enable --revoked {id} lets it connect again"
            )));
        }
        ctx.client
            .send(Method::Patch, &path(id), Some(&json!({"state": state})))
    })
}

/// `devices disconnect`.
pub fn disconnect(ctx: &Context, ids: Ids) -> Result<(), Failure> {
    each(ctx, &ids.read()?.names, "disconnected", |id| {
        ctx.client.send(Method::Post, &format!("{}/disconnect", path(id)), None)
    })
}

/// `devices delete`. Asks a person first.
pub fn delete(ctx: &Context, ids: Ids, is_confirmed: bool) -> Result<(), Failure> {
    let given = ids.read()?;
    let question = Question {
        verb: "Delete",
        effect: "The secret is lost, and the session ends.",
        is_always_asked: true,
    };
    given.confirm(ctx, &question, is_confirmed)?;
    each(ctx, &given.names, "deleted", |id| {
        ctx.client.send(Method::Delete, &path(id), None)?;
        Ok(json!({ "deleted": id.to_string() }))
    })
}

fn is_yes(answer: &str) -> bool {
    let answer = answer.trim();
    answer.eq_ignore_ascii_case("y") || answer.eq_ignore_ascii_case("yes")
}

/// Changes each device, even after one has failed. Stops if the gateway can't be reached.
fn each(
    ctx: &Context,
    ids: &[Name],
    done: &str,
    change: impl Fn(&Name) -> Result<Value, Failure>,
) -> Result<(), Failure> {
    if let [id] = ids {
        return ctx.show(&change(id)?, |_| format!("{done} {id}\n"));
    }
    let (mut changed, mut failed) = (Vec::new(), Vec::new());
    for id in ids {
        match change(id) {
            Ok(answer) => {
                if !ctx.json {
                    table::print(&format!("{done} {id}\n"))?;
                }
                changed.push(answer);
            }
            Err(failure @ (Failure::Unreachable(_) | Failure::OutputClosed)) => return Err(failure),
            Err(failure) => {
                if !ctx.json {
                    note(&format!("not {done} {id}: {}", failure.text().unwrap_or_default()));
                }
                failed.push(json!({"id": id.to_string(), "problem": failure.problem()}));
            }
        }
    }
    if ctx.json {
        table::print(&table::json(&json!({"items": changed, "failed": failed})))?;
    }
    match failed.len() {
        0 => Ok(()),
        failed => Err(Failure::failed(format!(
            "{failed} of {} devices were not {done}",
            ids.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_one_per_line() {
        let id = "6f1f64a0-0000-4000-8000-000000000001";

        let names = lines(format!("{id}\r\n\n  pump 7 \n").as_bytes()).unwrap();

        assert_eq!(names.iter().map(Name::as_str).collect::<Vec<_>>(), [id, "pump 7"]);
        assert!(matches!(lines("\u{7}\n".as_bytes()), Err(Failure::WrongUse(_))));
    }

    #[test]
    fn ids_of_a_spreadsheet_or_a_windows_shell_are_read() {
        let list = "id\npump 7\nid\n";
        let utf_16: Vec<u8> = std::iter::once(0xfeff)
            .chain(list.encode_utf16())
            .flat_map(u16::to_le_bytes)
            .collect();

        for bytes in [list.as_bytes(), format!("\u{feff}{list}").as_bytes(), &utf_16] {
            let names = lines(bytes).unwrap();
            assert_eq!(names.iter().map(Name::as_str).collect::<Vec<_>>(), ["pump 7", "id"]);
        }
        assert!(matches!(lines(&b"\xff\xfe\x80"[2..]), Err(Failure::WrongUse(_))));
    }

    #[test]
    fn only_yes_is_yes() {
        assert!(is_yes("yes\n") && is_yes("Y\n"));
        assert!(!is_yes("\n") && !is_yes("no\n") && !is_yes("yesterday\n"));
    }
}
