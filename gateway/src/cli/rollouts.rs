//! `seawall rules release` and `seawall rules rollout`: staged changes of a rule.

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::{Context, Failure, client::Method, table, time::span};

/// Stages of a rollout, and what each of them needs.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Shares of the matched devices, in percent, rising, as in 1,5,25,50,100
    #[arg(long, value_name = "PERCENTS", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=100))]
    stages: Vec<u8>,
    /// Minimum time of a stage, as in 10m [default: 10m]
    #[arg(long, value_name = "SPAN", value_parser = span)]
    bake: Option<String>,
    /// Connects that a stage needs [default: 200]
    #[arg(long, value_name = "NUMBER")]
    connects_min: Option<u32>,
}

/// A change of a rollout.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Action {
    /// Stay at this stage
    Pause,
    /// Continue, with no evidence for this stage
    Resume,
    /// Make the rule act as before
    Revert,
}

impl PlanArgs {
    /// Returns the fields that were given.
    pub fn body(self) -> Map<String, Value> {
        let mut body = Map::new();
        if !self.stages.is_empty() {
            body.insert("stages".into(), self.stages.into());
        }
        if let Some(bake) = self.bake {
            body.insert("bake".into(), bake.into());
        }
        if let Some(connects_min) = self.connects_min {
            body.insert("connects_min".into(), connects_min.into());
        }
        body
    }
}

/// Starts the release of a blocked cohort.
pub fn release(ctx: &Context, rule: uuid::Uuid, plan: PlanArgs) -> Result<(), Failure> {
    let path = format!("/api/v1/rules/{rule}/release");
    ctx.show(
        &ctx.client.send(Method::Post, &path, Some(&plan.body().into()))?,
        shown_rollout,
    )
}

/// Shows or changes the rollout of a rule.
pub fn rollout(ctx: &Context, rule: uuid::Uuid, action: Option<Action>) -> Result<(), Failure> {
    let path = format!("/api/v1/rules/{rule}/rollout");
    let answer = match action {
        None => ctx.client.get(&path, &[])?,
        Some(action) => {
            let state = match action {
                Action::Pause => "paused",
                Action::Resume => "running",
                Action::Revert => "reverted",
            };
            let body = json!({ "state": state });
            ctx.client.send(Method::Patch, &path, Some(&body))?
        }
    };
    ctx.show(&answer, shown_rollout)
}

/// Returns a rollout with a line per fact, and a table of its steps.
fn shown_rollout(rollout: &Value) -> String {
    let number = |path: &str| rollout.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    let counts = |side: &str| {
        format!(
            "{} of {} connects failed",
            number(&format!("/evidence/{side}/failed")),
            number(&format!("/evidence/{side}/connects"))
        )
    };
    let stages: Vec<String> = rollout
        .get("stages")
        .map(table::list)
        .unwrap_or_default()
        .iter()
        .map(|stage| format!("{stage} %"))
        .collect();
    let ratio = rollout
        .pointer("/evidence/log_likelihood_ratio")
        .and_then(Value::as_f64)
        .unwrap_or_default();
    let mut text = table::facts(&[
        ("rule", table::at(rollout, "rule")),
        ("direction", table::at(rollout, "direction")),
        ("state", table::at(rollout, "state")),
        (
            "stage",
            format!("{} of {}, {} %", number("/stage"), stages.len(), number("/percent")),
        ),
        ("stages", stages.join(", ")),
        (
            "each needs",
            format!(
                "{}, {} connects, and evidence that it is not worse",
                table::at(rollout, "bake"),
                number("/connects_needed")
            ),
        ),
        ("treated", counts("treated")),
        ("control", counts("control")),
        (
            "sent away",
            format!(
                "{} of {} did not return in time",
                number("/evidence/returns/missing"),
                number("/evidence/returns/expected")
            ),
        ),
        (
            "log likelihood ratio",
            format!("{ratio:.2} (worse at 9.16, not worse at -3)"),
        ),
    ]);
    let steps = rollout.get("steps").map(table::list).unwrap_or_default();
    let rows = steps.iter().map(|step| {
        ["at", "stage", "percent", "verdict"]
            .into_iter()
            .map(|path| table::at(step, path))
            .collect()
    });
    text.push('\n');
    text.push_str(&table::table(&["AT", "STAGE", "PERCENT", "VERDICT"], rows));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollout_is_shown_with_its_evidence_and_steps() {
        let text = shown_rollout(&json!({
            "rule": "r", "direction": "release", "state": "halted", "stage": 1, "percent": 1, "stages": [1, 5, 100],
            "bake": "10m", "connects_min": 200, "connects_needed": 200,
            "evidence": {
                "treated": {"connects": 60, "failed": 9}, "control": {"connects": 5_000, "failed": 2},
                "returns": {"expected": 30, "missing": 4},
                "log_likelihood_ratio": 20.125,
            },
            "steps": [{"at": "2026-11-21T04:07:08Z", "stage": 1, "percent": 1, "verdict": "started"}],
        }));

        for part in [
            "1 of 3, 1 %",
            "9 of 60 connects failed",
            "2 of 5000 connects failed",
            "20.12 (worse",
            "4 of 30 did not return",
            "started",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
