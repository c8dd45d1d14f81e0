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

/// Devices that a command names.
#[derive(Debug, Args)]
pub struct Ids {
    /// Ids of the devices; `-` reads ids from standard input, one per line
    #[arg(required = true, value_name = "ID")]
    ids: Vec<Name>,
}

impl Ids {
    /// The ids, with those of standard input.
    fn read(self) -> Result<Vec<Name>, Failure> {
        let mut names = Vec::new();
        for id in self.ids {
            if id.as_str() == "-" {
                names.extend(lines(io::stdin().lock())?);
            } else {
                names.push(id);
            }
        }
        if names.is_empty() {
            return Err(Failure::WrongUse("standard input has no ids".into()));
        }
        Ok(names)
    }
}

/// One id per line; empty lines are skipped.
fn lines(input: impl BufRead) -> Result<Vec<Name>, Failure> {
    let mut names = Vec::new();
    for line in input.lines() {
        let line = line?;
        let line = line.trim();
        if !line.is_empty() {
            let name = line
                .parse()
                .map_err(|problem| Failure::WrongUse(format!("standard input: {line:?}: {problem}")))?;
            names.push(name);
        }
    }
    Ok(names)
}

/// `devices enable` and `devices disable`. A revoked device stays revoked unless `may_unrevoke`.
pub fn set_state(ctx: &Context, ids: Ids, state: &'static str, may_unrevoke: bool) -> Result<(), Failure> {
    each(ctx, &ids.read()?, state, |id| {
        if !may_unrevoke && state != "revoked" && ctx.client.get(&path(id), &[])?["state"] == "revoked" {
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
    each(ctx, &ids.read()?, "disconnected", |id| {
        ctx.client.send(Method::Post, &format!("{}/disconnect", path(id)), None)
    })
}

/// `devices delete`. Asks a person first.
pub fn delete(ctx: &Context, ids: Ids, is_confirmed: bool) -> Result<(), Failure> {
    let ids = ids.read()?;
    if !is_confirmed && io::stdin().is_terminal() && io::stderr().is_terminal() {
        let devices = match ids.as_slice() {
            [id] => format!("device {id}"),
            several => format!("{} devices", several.len()),
        };
        note(&format!(
            "Delete {devices}? The secret is lost, and the session ends. Type yes to go on:"
        ));
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !is_yes(&answer) {
            return Err(Failure::failed("nothing was deleted"));
        }
    }
    each(ctx, &ids, "deleted", |id| {
        ctx.client.send(Method::Delete, &path(id), None)?;
        Ok(json!({ "deleted": id.to_string() }))
    })
}

fn is_yes(answer: &str) -> bool {
    let answer = answer.trim();
    answer.eq_ignore_ascii_case("y") || answer.eq_ignore_ascii_case("yes")
}

/// Changes each device, the others also where one fails. Stops where the gateway cannot be reached.
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
    fn only_yes_is_yes() {
        assert!(is_yes("yes\n") && is_yes("Y\n"));
        assert!(!is_yes("\n") && !is_yes("no\n") && !is_yes("yesterday\n"));
    }
}
