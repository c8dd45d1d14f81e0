//! `seawall rules`: list, preview, add, change and remove firmware rules.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
};

use clap::Subcommand;
use seawall_proto::rules::Effect;
use serde_json::{Map, Value, json};

use super::{
    Context, Failure,
    client::{Answer, Method},
    eviction, note,
    rollouts::{self, Action, PlanArgs},
    rule_args::{EffectArgs, RuleArgs, from_file, insert, mode, range, with_confirm},
    rule_view::{local_note, return_of, rule_effect, shown_match, shown_preview, shown_rule, shown_rules},
    table,
    time::{point, span},
};

/// Maximum number of rules that are requested.
const RULES_MAX: usize = 10_000;
/// Minimum length of the beginning or end of a rule id that is accepted.
const PART_LEN_MIN: usize = 4;
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
    /// Add a rule, from arguments or from a JSON file
    Add {
        #[command(flatten)]
        rule: RuleArgs,
        #[command(flatten)]
        effect: EffectArgs,
        /// The rule as JSON (`-`: standard input) instead of arguments
        #[arg(long, value_name = "FILE", conflicts_with_all = [
            "firmware", "from", "below", "all_versions", "model", "tenant", "reason", "effect",
            "update_json", "update_file", "rate", "allow", "dry_run", "admit_percent", "retry_after",
            "expires", "evict",
        ])]
        file: Option<PathBuf>,
    },
    /// Refuse a range of firmware versions: seawall rules block --from 3.8.0-b3 --reason 'storms'
    Block {
        #[command(flatten)]
        rule: RuleArgs,
        /// Enforce the rule in stages that advance on evidence: see `rules rollout`
        #[arg(long)]
        staged: bool,
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// Release the devices that a rule refuses, in stages that advance on evidence
    Release {
        /// Id, its beginning or end, or the range as it was given
        #[arg(value_name = "ID|RANGE")]
        rule: String,
        #[command(flatten)]
        plan: PlanArgs,
    },
    /// Show, pause, resume or revert the staged change of a rule
    Rollout {
        /// Id, its beginning or end, or the range as it was given
        #[arg(value_name = "ID|RANGE")]
        rule: String,
        /// What to do; without it the rollout is shown
        action: Option<Action>,
    },
    /// Show how far the eviction of a rule is on this node, or cancel it on all nodes
    Eviction {
        /// Id, its beginning or end, or the range as it was given
        #[arg(value_name = "ID|RANGE")]
        rule: String,
        /// What to do; without it the progress is shown
        action: Option<eviction::Action>,
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
    /// Preview the devices that a rule would match; adds nothing
    Preview {
        #[command(flatten)]
        rule: RuleArgs,
    },
    /// Change a rule; fields that are not given stay
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
        /// New minimum time before a refused device reconnects, as in 15m
        #[arg(long, value_name = "SPAN", value_parser = span)]
        retry_after: Option<String>,
        /// New end: RFC 3339, a duration from now as in 2h, or `never`
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
        /// Also close matching sessions, at a pace
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        evict: Option<bool>,
        /// Share of the matched devices that is admitted, in percent; raising it refuses no admitted device
        #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
        admit_percent: Option<u8>,
        /// Only count what the rule would do (`false`: enforce it)
        #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        dry_run: Option<bool>,
        #[command(flatten)]
        effect: EffectArgs,
        /// Device that the rule never applies to; may be given several times. Replaces the list; empty: removes it
        #[arg(long, value_name = "ID")]
        allow: Vec<String>,
        /// Do it even if it refuses over 30 % of the connected devices
        #[arg(long)]
        confirm: bool,
    },
}

pub fn run(ctx: &Context, verb: Rules) -> Result<(), Failure> {
    match verb {
        Rules::List => ctx.show(&ctx.client.list("/api/v1/rules", &[], RULES_MAX)?, shown_rules),
        Rules::Show { rule } => ctx.show(&find(ctx, &rule, None, None)?, shown_rule),
        Rules::Add { rule, effect, file } => {
            let body = match file {
                Some(path) => with_confirm(from_file(&path)?, rule.confirm),
                None => {
                    let mut body = rule.body()?;
                    body.insert("effect".into(), Effect::Block.as_str().into());
                    effect.insert_into(&mut body)?;
                    body
                }
            };
            block(ctx, body)
        }
        Rules::Block { rule, staged, plan } => {
            let mut body = rule.body()?;
            body.insert("effect".into(), "block".into());
            let plan = plan.body();
            if staged || !plan.is_empty() {
                body.insert("rollout".into(), plan.into());
            }
            block(ctx, body)
        }
        Rules::Release { rule, plan } => {
            let rule = find(ctx, &rule, None, None)?;
            rollouts::release(ctx, id_of(&rule)?, plan)
        }
        Rules::Rollout { rule, action } => {
            let rule = find(ctx, &rule, None, None)?;
            rollouts::rollout(ctx, id_of(&rule)?, action)
        }
        Rules::Eviction { rule, action } => {
            let rule = find(ctx, &rule, None, None)?;
            eviction::run(ctx, id_of(&rule)?, action)
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
            dry_run,
            effect,
            allow,
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
            insert(&mut body, "mode", dry_run.map(mode));
            effect.insert_into(&mut body)?;
            if !allow.is_empty() {
                let allow: Vec<String> = allow.into_iter().filter(|device| !device.is_empty()).collect();
                body.insert("allow".into(), allow.into());
            }
            if body.is_empty() {
                return Err(Failure::WrongUse(
                    "rules edit: give at least one field to change, such as --reason or --expires".into(),
                ));
            }
            let path = format!("/api/v1/rules/{}", id_of(&rule)?);
            let answer = ctx
                .client
                .send_any(Method::Patch, &path, Some(&with_confirm(body, confirm).into()))?;
            ctx.show(&confirmed(ctx, answer)?, |rule| {
                let local = local_note(rule).map(|note| format!("{note}\n"));
                format!("{}{}", shown_rules(&json!([rule])), local.unwrap_or_default())
            })
        }
    }
}

/// Creates a rule, and prints its effect.
fn block(ctx: &Context, body: Map<String, Value>) -> Result<(), Failure> {
    // Only for the text afterwards. A block must neither wait for it nor fail with it.
    let mut asked = body.clone();
    asked.remove("confirm");
    let preview = ctx
        .client
        .send(Method::Post, "/api/v1/rules/preview", Some(&asked.into()))
        .unwrap_or_default();
    let answer = ctx.client.send_any(Method::Post, "/api/v1/rules", Some(&body.into()))?;
    let rule = confirmed(ctx, answer)?;
    let mut lines = rule_effect(&rule, &preview);
    lines.extend(local_note(&rule));
    lines.push(format!("undo with: seawall rules unblock {}", table::at(&rule, "id")));
    // The output may go to a file that the shell made of half a range. So the terminal shows it.
    if !io::stdout().is_terminal() {
        lines.iter().for_each(|line| note(line));
    }
    ctx.show(&rule, |rule| {
        let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
        format!("{}{lines}", shown_rules(&json!([rule])))
    })
}

/// Returns the rule. If a confirmation is required, the error shows the preview and how to confirm.
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
    let answer = ctx.client.send(Method::Delete, &format!("/api/v1/rules/{id}"), None)?;
    ctx.show(&rule, |rule| {
        let local = local_note(&answer).map(|note| format!("{note}\n"));
        format!(
            "removed {id}, which matched {}\n{}\n{}",
            shown_match(rule),
            return_of(rule),
            local.unwrap_or_default()
        )
    })
}

/// Finds the one rule that the operator named.
fn find(ctx: &Context, named: &str, model: Option<&str>, tenant: Option<&str>) -> Result<Value, Failure> {
    let rules = ctx.client.list("/api/v1/rules", &[], RULES_MAX)?;
    let lower = named.to_ascii_lowercase();
    // Rules of the same time have the same beginning, and a random end.
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
        .ok_or_else(|| Failure::failed("the gateway returned a rule without an id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_the_same_whatever_their_spaces() {
        assert!(same_range(">= 3.8.0-b3, <3.9", ">=3.8.0-b3,<3.9"));
        assert!(!same_range(">=3.8.0-b3", ">3.8.0-b3"));
    }
}
