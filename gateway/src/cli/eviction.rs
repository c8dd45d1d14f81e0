//! `seawall rules eviction`: the sessions that a rule closes.

use clap::ValueEnum;
use serde_json::Value;

use super::{Context, Failure, client::Method, table};

/// A change of an eviction.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Action {
    /// Keep the sessions that are left; the rule still refuses devices that connect
    Cancel,
}

/// Shows or cancels the eviction of a rule.
pub fn run(ctx: &Context, rule: uuid::Uuid, action: Option<Action>) -> Result<(), Failure> {
    let path = format!("/api/v1/rules/{rule}/eviction");
    let answer = match action {
        None => ctx.client.get(&path, &[])?,
        Some(Action::Cancel) => ctx.client.send(Method::Delete, &path, None)?,
    };
    ctx.show(&answer, shown)
}

fn shown(eviction: &Value) -> String {
    let rate = eviction.get("rate").and_then(Value::as_f64).filter(|rate| *rate > 0.0);
    let eta = eviction.get("eta_seconds").and_then(Value::as_f64);
    table::facts(&[
        ("rule", table::at(eviction, "rule")),
        ("state", table::at(eviction, "state")),
        ("evicted", table::at(eviction, "evicted")),
        ("left", table::at(eviction, "left")),
        (
            "rate",
            rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1} per second")),
        ),
        (
            "time left",
            eta.map_or_else(|| "-".to_owned(), |eta| format!("about {:.0} s", eta.ceil())),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn eviction_says_how_far_it_is_and_when_it_ends() {
        let running =
            json!({"rule": "r", "state": "running", "evicted": 50, "left": 150, "rate": 20.0, "eta_seconds": 7.5});
        let off = json!({"rule": "r", "state": "off", "evicted": 50, "left": 0, "rate": 0.0, "eta_seconds": null});

        for part in ["running", "50", "150", "20.0 per second", "about 8 s"] {
            assert!(shown(&running).contains(part), "{part}: {}", shown(&running));
        }
        assert!(shown(&off).contains("off") && !shown(&off).contains("per second"));
    }
}
