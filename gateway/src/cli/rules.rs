//! `seawall rules`: see, preview, add, change and remove firmware rules.

use std::{
    io::{self, IsTerminal, Read},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use seawall_proto::firmware::{Range, RangeError};
use serde_json::{Map, Value, json};

use super::{
    Context, Failure,
    client::{Answer, Method},
    note,
    rule_view::{return_of, rule_effect, shown_match, shown_preview, shown_rule, shown_rules},
    table,
};

/// Rules on one node; more than this is not asked for.
const RULES_MAX: usize = 10_000;
/// Shortest beginning or end of a rule id that is taken for it.
const PART_LEN_MIN: usize = 4;
/// Shortest time before a device comes back that a rule with `--evict` refuses, where none is named: a rule that was a mistake is
/// undone within minutes.
const EVICT_RETRY_AFTER: &str = "2m";
/// Greatest file for `rules add --file`.
const FILE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Debug, Subcommand)]
pub enum Rules {
    /// Every rule
    List,
    /// One rule, with what it did
    Show {
        /// Id, its beginning or end, or the range as it was given
        #[arg(value_name = "ID|RANGE")]
        rule: String,
    },
    /// Add a rule, also one from a JSON file
    Add {
        #[command(flatten)]
        rule: RuleArgs,
        // This version has one effect, one mode and one share: the API says so to whoever asks for another.
        #[arg(long, default_value = "block", hide = true)]
        effect: String,
        #[arg(long, default_value = "enforce", hide = true)]
        mode: String,
        #[arg(long, default_value_t = 0, hide = true)]
        admit_percent: u8,
        /// The rule as JSON (`-`: standard input) instead of arguments
        #[arg(long, value_name = "FILE", conflicts_with_all = ["firmware", "from", "below", "all_versions", "model", "tenant", "reason", "effect", "mode", "admit_percent", "retry_after", "expires", "evict"])]
        file: Option<PathBuf>,
    },
    /// Refuse a range of firmware versions: seawall rules block --from 3.8.0-b3 --reason 'storms'
    Block {
        #[command(flatten)]
        rule: RuleArgs,
    },
    /// Remove a rule, named by its id, the beginning or the end of it, or its range
    Unblock {
        /// Id, its beginning or end, or the range as it was given
        #[arg(value_name = "ID|RANGE")]
        rule: String,
        /// Of several rules with that range, the one for this model
        #[arg(long)]
        model: Option<String>,
        /// Of several rules with that range, the one for this tenant
        #[arg(long)]
        tenant: Option<String>,
    },
    /// What a rule would hit now; adds nothing
    Preview {
        #[command(flatten)]
        rule: RuleArgs,
    },
    /// Change a rule; what isn't given stays
    Edit {
        /// Id of the rule, or its beginning or end
        #[arg(value_name = "ID")]
        rule: String,
        /// New range of versions
        #[arg(long, value_name = "RANGE", value_parser = range)]
        firmware: Option<String>,
        /// Only devices of this model; empty: of every model
        #[arg(long)]
        model: Option<String>,
        /// Only devices of this tenant; empty: of every tenant
        #[arg(long)]
        tenant: Option<String>,
        /// New reason; devices see it
        #[arg(long)]
        reason: Option<String>,
        /// New shortest time before a refused device comes back, as in 15m
        #[arg(long, value_name = "SPAN", value_parser = span)]
        retry_after: Option<String>,
        /// New end: RFC 3339, a span from now as in 2h, or `never`
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
        /// Close matching sessions too, at a pace
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        evict: Option<bool>,
        #[arg(long, hide = true)]
        admit_percent: Option<u8>,
        /// Do it even if it refuses over 30 % of the connected devices
        #[arg(long)]
        confirm: bool,
    },
}

/// What a rule matches, and what matched devices are told.
#[derive(Debug, Args)]
pub struct RuleArgs {
    /// Range of versions, in quotes, as in '>=3.8.0-b3', '3.8.*', '>=3.8,<3.9' or '=(none)'
    #[arg(value_name = "RANGE", value_parser = range)]
    firmware: Option<String>,
    /// This version and later ones; needs no quotes
    #[arg(long, value_name = "VERSION", value_parser = from, conflicts_with = "firmware")]
    from: Option<String>,
    /// Versions before this one; needs no quotes
    #[arg(long, value_name = "VERSION", value_parser = below, conflicts_with = "firmware")]
    below: Option<String>,
    /// Every version, also devices that state none
    #[arg(long, conflicts_with_all = ["firmware", "from", "below"])]
    all_versions: bool,
    /// Only devices of this model
    #[arg(long)]
    model: Option<String>,
    /// Only devices of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Why; refused devices, and whoever looks after them, can read it
    #[arg(long)]
    reason: Option<String>,
    /// Shortest time before a refused device comes back, as in 15m; it is told up to twice that [default: 15m, with --evict 2m]
    #[arg(long, value_name = "SPAN", value_parser = span)]
    retry_after: Option<String>,
    /// When the rule ends by itself: RFC 3339, or a span from now as in 2h
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Close matching sessions too, at a pace
    #[arg(long)]
    evict: bool,
    /// Do it even if it refuses over 30 % of the connected devices
    #[arg(long)]
    confirm: bool,
}

pub fn run(ctx: &Context, verb: Rules) -> Result<(), Failure> {
    match verb {
        Rules::List => ctx.show(&ctx.client.list("/api/v1/rules", &[], RULES_MAX)?, shown_rules),
        Rules::Show { rule } => ctx.show(&find(ctx, &rule, None, None)?, shown_rule),
        Rules::Add {
            rule,
            effect,
            mode,
            admit_percent,
            file,
        } => {
            let body = match file {
                Some(path) => with_confirm(from_file(&path)?, rule.confirm),
                None => {
                    let mut body = rule.body()?;
                    body.insert("effect".into(), effect.into());
                    body.insert("mode".into(), mode.into());
                    body.insert("admit_percent".into(), admit_percent.into());
                    body
                }
            };
            block(ctx, body)
        }
        Rules::Block { rule } => {
            let mut body = rule.body()?;
            body.insert("effect".into(), "block".into());
            block(ctx, body)
        }
        Rules::Unblock { rule, model, tenant } => unblock(ctx, &rule, model.as_deref(), tenant.as_deref()),
        Rules::Preview { rule } => {
            let mut body = rule.body()?;
            body.insert("effect".into(), "block".into());
            ctx.show(
                &ctx.client
                    .send(Method::Post, "/api/v1/rules/preview", Some(&body.into()))?,
                shown_preview,
            )
        }
        Rules::Edit {
            rule,
            firmware,
            model,
            tenant,
            reason,
            retry_after,
            expires,
            evict,
            admit_percent,
            confirm,
        } => {
            let rule = find(ctx, &rule, None, None)?;
            let mut body = Map::new();
            if firmware.is_some() || model.is_some() || tenant.is_some() {
                let matches = rule.get("match").and_then(Value::as_object);
                let mut matches = matches.cloned().unwrap_or_default();
                for (field, text) in [("firmware", firmware), ("model", model), ("tenant", tenant)] {
                    match text.as_deref() {
                        None => {}
                        Some("") => drop(matches.remove(field)),
                        Some(text) => drop(matches.insert(field.into(), text.into())),
                    }
                }
                body.insert("match".into(), matches.into());
            }
            insert(&mut body, "reason", reason);
            insert(&mut body, "retry_after", retry_after);
            match expires.as_deref() {
                Some("never") => drop(body.insert("expires_at".into(), Value::Null)),
                Some(time) => drop(body.insert("expires_at".into(), point(time)?.into())),
                None => {}
            }
            insert(&mut body, "evict", evict);
            insert(&mut body, "admit_percent", admit_percent);
            if body.is_empty() {
                return Err(Failure::WrongUse(
                    "rules edit: name what should change, as in --reason or --expires".into(),
                ));
            }
            let path = format!("/api/v1/rules/{}", id_of(&rule)?);
            let answer = ctx
                .client
                .send_any(Method::Patch, &path, Some(&with_confirm(body, confirm).into()))?;
            ctx.show(&confirmed(ctx, answer)?, |rule| shown_rules(&json!([rule])))
        }
    }
}

impl RuleArgs {
    /// The range that was named, in the API's form.
    fn range(&self) -> Option<String> {
        if self.firmware.is_some() {
            return self.firmware.clone();
        }
        let parts: Vec<&str> = self.from.iter().chain(&self.below).map(String::as_str).collect();
        (!parts.is_empty()).then(|| parts.join(","))
    }

    fn body(self) -> Result<Map<String, Value>, Failure> {
        let firmware = self.range();
        if firmware.is_none() && !self.all_versions {
            return Err(Failure::WrongUse(
                "name the versions: a RANGE in quotes such as '>=3.8.0-b3', --from and --below, or --all-versions. A > without quotes is the shell's, and what stands behind it a file".into(),
            ));
        }
        let mut matches = Map::new();
        insert(&mut matches, "firmware", firmware);
        insert(&mut matches, "model", self.model);
        insert(&mut matches, "tenant", self.tenant);
        let mut body = Map::new();
        body.insert("match".into(), matches.into());
        insert(&mut body, "reason", self.reason);
        let evicting = || self.evict.then(|| EVICT_RETRY_AFTER.to_owned());
        insert(&mut body, "retry_after", self.retry_after.or_else(evicting));
        insert(&mut body, "expires_at", self.expires.as_deref().map(point).transpose()?);
        body.insert("evict".into(), self.evict.into());
        Ok(with_confirm(body, self.confirm))
    }
}

fn with_confirm(mut body: Map<String, Value>, is_confirmed: bool) -> Map<String, Value> {
    if is_confirmed {
        body.insert("confirm".into(), true.into());
    }
    body
}

fn insert(body: &mut Map<String, Value>, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        body.insert(key.into(), value.into());
    }
}

fn from_file(path: &PathBuf) -> Result<Map<String, Value>, Failure> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        io::stdin().take(FILE_BYTES_MAX).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
    };
    read.map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    serde_json::from_str(&text).map_err(|error| Failure::WrongUse(format!("{}: {error}", path.display())))
}

/// Makes a rule, and says whom it hits and what they are told.
fn block(ctx: &Context, body: Map<String, Value>) -> Result<(), Failure> {
    // Only for what is said afterwards: a block must not wait for it, nor fail where it does.
    let mut asked = body.clone();
    asked.remove("confirm");
    let preview = ctx
        .client
        .send(Method::Post, "/api/v1/rules/preview", Some(&asked.into()))
        .unwrap_or_default();
    let answer = ctx.client.send_any(Method::Post, "/api/v1/rules", Some(&body.into()))?;
    let rule = confirmed(ctx, answer)?;
    let mut lines = rule_effect(&rule, &preview);
    lines.push(format!("undo with: seawall rules unblock {}", table::at(&rule, "id")));
    // Where the output goes to a file, perhaps one that the shell made of half a range, the terminal says it.
    if !io::stdout().is_terminal() {
        lines.iter().for_each(|line| note(line));
    }
    ctx.show(&rule, |rule| {
        let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
        format!("{}{lines}", shown_rules(&json!([rule])))
    })
}

/// The rule; where it asks for confirmation, what it would hit and how to confirm.
fn confirmed(ctx: &Context, answer: Answer) -> Result<Value, Failure> {
    if answer.code() != Some("needs_confirmation") {
        return answer.ok();
    }
    let preview = answer.body.get("preview");
    if let Some(preview) = preview.filter(|_| !ctx.json) {
        note_lines(&shown_preview(preview));
    }
    let why = preview.and_then(|preview| preview.get("confirmation")?.as_str());
    let text = format!(
        "{}. Nothing was changed. Add --confirm to do it",
        why.unwrap_or("the rule would refuse many devices")
    );
    Err(answer.refused(text))
}

fn note_lines(text: &str) {
    text.lines().for_each(note);
}

fn unblock(ctx: &Context, named: &str, model: Option<&str>, tenant: Option<&str>) -> Result<(), Failure> {
    let rule = find(ctx, named, model, tenant)?;
    let id = id_of(&rule)?;
    ctx.client.send(Method::Delete, &format!("/api/v1/rules/{id}"), None)?;
    ctx.show(&rule, |rule| {
        format!(
            "removed {id}, which matched {}\n{}\n",
            shown_match(rule),
            return_of(rule)
        )
    })
}

/// The one rule that an operator named.
fn find(ctx: &Context, named: &str, model: Option<&str>, tenant: Option<&str>) -> Result<Value, Failure> {
    let rules = ctx.client.list("/api/v1/rules", &[], RULES_MAX)?;
    let lower = named.to_ascii_lowercase();
    // Rules that were made together begin alike, and end as chance has it.
    let is_part = |rule: &Value| {
        lower.len() >= PART_LEN_MIN
            && rule
                .get("id")
                .and_then(Value::as_str)
                .is_some_and(|id| id.starts_with(&lower) || id.ends_with(&lower))
    };
    let has = |rule: &Value, key: &str, wanted: Option<&str>| {
        wanted.is_none_or(|wanted| rule.pointer(&format!("/match/{key}")).and_then(Value::as_str) == Some(wanted))
    };
    let has_range = |rule: &Value| {
        rule.pointer("/match/firmware")
            .and_then(Value::as_str)
            .is_some_and(|range| same_range(range, named))
            && has(rule, "model", model)
            && has(rule, "tenant", tenant)
    };
    let found: Vec<&Value> = table::list(&rules)
        .iter()
        .filter(|rule| is_part(rule) || has_range(rule))
        .collect();
    match found.as_slice() {
        [rule] => Ok((*rule).clone()),
        [] => Err(Failure::failed(format!("no rule has the id or the range {named}"))),
        several => {
            note_lines(&shown_rules(&Value::Array(
                several.iter().map(|rule| (*rule).clone()).collect(),
            )));
            Err(Failure::failed(format!(
                "{} rules go by {named}: name one by its id, or by the end of it",
                several.len()
            )))
        }
    }
}

fn same_range(a: &str, b: &str) -> bool {
    let bare = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
    bare(a) == bare(b)
}

fn id_of(rule: &Value) -> Result<uuid::Uuid, Failure> {
    rule.get("id")
        .and_then(Value::as_str)
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| Failure::failed("the gateway named a rule without an id"))
}

/// Text of a range that the API takes: a wrong one is found before anything is sent.
fn range(text: &str) -> Result<String, RangeError> {
    text.parse::<Range>().map(|_| text.to_owned())
}

/// The range of this version and later ones.
fn from(version: &str) -> Result<String, RangeError> {
    range(&format!(">={version}"))
}

/// The range of the versions before this one.
fn below(version: &str) -> Result<String, RangeError> {
    range(&format!("<{version}"))
}

/// Text of a span that the API takes, as in `15m`.
pub fn span(text: &str) -> Result<String, humantime::DurationError> {
    humantime::parse_duration(text).map(|_| text.to_owned())
}

/// RFC 3339 from a point in time, or from a span from now, of which a part of a second counts as a whole one.
fn point(text: &str) -> Result<String, Failure> {
    let wrong = || {
        Failure::WrongUse(format!(
            "--expires: {text}: expected RFC 3339, as in 2026-01-31T12:00:00Z, or a span from now, as in 2h"
        ))
    };
    let time = match humantime::parse_duration(text) {
        Ok(span) => {
            let (now, rounding) = (SystemTime::now(), Duration::from_millis(999));
            now.checked_add(span.saturating_add(rounding)).ok_or_else(wrong)?
        }
        Err(_) => point_in_time(text).ok_or_else(wrong)?,
    };
    Ok(humantime::format_rfc3339_seconds(time).to_string())
}

/// RFC 3339 with `Z` or an offset, in either letter case, or without either: then UTC.
fn point_in_time(text: &str) -> Option<SystemTime> {
    let text = text.trim().to_ascii_uppercase();
    // Behind the date: a hyphen before it belongs to that.
    let sign = text.get(10..)?.rfind(['+', '-']).map(|at| at + 10);
    let Some(sign) = sign else {
        return humantime::parse_rfc3339_weak(&text).ok();
    };
    let (local, offset) = text.split_at(sign);
    let local = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let number = |text: &str, max: u64| -> Option<u64> {
        let is_number = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number
            .then(|| text.parse().ok())
            .flatten()
            .filter(|number| *number <= max)
    };
    let ahead = Duration::from_secs((number(hours, 23)? * 60 + number(minutes, 59)?) * 60);
    if offset.starts_with('+') {
        local.checked_sub(ahead)
    } else {
        local.checked_add(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiry_is_a_point_or_a_span_from_now() {
        assert_eq!(point("2099-01-31T12:00:00Z").unwrap(), "2099-01-31T12:00:00Z");
        for text in [
            "2099-01-31t12:00:00z",
            "2099-01-31T14:00:00+02:00",
            "2099-01-31t07:30:00-04:30",
            "2099-01-31T12:00:00.9+00:00",
            "2099-01-31 12:00:00",
        ] {
            assert_eq!(point(text).unwrap(), "2099-01-31T12:00:00Z", "{text}");
        }
        for text in [
            "2099-01-31T12:00:00+2",
            "2099-01-31T12:00:00+24:00",
            "2099-01-31T12:00:00+02:60",
            "2099-01-31T12:00:00++1:00",
            "2099-01-31T12:00+02:00",
            "2099-01-31+02:00",
        ] {
            assert!(matches!(point(text), Err(Failure::WrongUse(_))), "{text}");
        }
        let soon = humantime::parse_rfc3339(&point("1ms").unwrap()).unwrap();
        assert!(soon > SystemTime::now(), "over before it is asked for");
        for text in ["tomorrow", "", "99999999999999999999y"] {
            assert!(matches!(point(text), Err(Failure::WrongUse(_))), "{text}");
        }
    }

    #[test]
    fn ranges_are_the_same_whatever_their_spaces() {
        assert!(same_range(">= 3.8.0-b3, <3.9", ">=3.8.0-b3,<3.9"));
        assert!(!same_range(">=3.8.0-b3", ">3.8.0-b3"));
    }
}
