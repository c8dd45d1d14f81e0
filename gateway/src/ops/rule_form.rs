//! How rules look in the API: as they are asked for, and as they are shown.
//!
//! What the fields of a rule may be is written once, in `seawall_proto`; the `…Doc` types describe them for the OpenAPI document,
//! and a test compares the two.

use seawall_proto::{
    id::RuleId,
    rules::{Rule, RuleSpec, Unsupported},
    time::WallTime,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

use super::problem::{Problem, shortened};
use crate::{
    events::format_time,
    rules::{Rules, hits::Hits},
};

/// A rule as it is asked for: the fields of a rule, and `confirm`. What a rule's fields may be is written once, in `seawall_proto`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct Asked(Map<String, Value>);

/// A rule. Unknown fields are refused.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RuleBody)]
#[expect(
    dead_code,
    reason = "describes `RuleSpec` for the OpenAPI document; a test compares the two"
)]
pub struct RuleDoc {
    r#match: MatchDoc,
    /// What happens to the devices: `block`.
    #[schema(pattern = "^block$")]
    effect: String,
    /// Share of the matched devices that is let through, in percent: 0.
    #[schema(nullable = false, default = 0, maximum = 0)]
    admit_percent: Option<u8>,
    /// Whether the rule acts: `enforce`.
    #[schema(nullable = false, default = "enforce")]
    mode: Option<String>,
    /// Told to the devices that are refused: public. At most 256 bytes, no control characters.
    #[schema(nullable = false)]
    reason: Option<String>,
    /// Refused devices come back between this and twice this. 1 second to 7 days.
    #[schema(nullable = false, default = "15m")]
    retry_after: Option<String>,
    /// From then on it matches nothing: not in the past. RFC 3339.
    expires_at: Option<String>,
    /// Close live sessions that match, too, at a pace.
    #[schema(nullable = false, default = false)]
    evict: Option<bool>,
    /// The caller knows that it refuses over 30 % of the connected devices.
    #[schema(nullable = false, default = false)]
    confirm: Option<bool>,
}

/// Which devices: all that is given must hold.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RuleMatch)]
#[expect(
    dead_code,
    reason = "describes `Match` for the OpenAPI document; a test compares the two"
)]
pub struct MatchDoc {
    /// A comma-separated conjunction of `=`, `!=`, `<`, `<=`, `>`, `>=` and wildcards.
    #[schema(nullable = false, example = ">=3.8.0-b3")]
    firmware: Option<String>,
    #[schema(nullable = false)]
    model: Option<String>,
    #[schema(nullable = false)]
    tenant: Option<String>,
}

/// What to change of a rule; what is not given stays. `match` is replaced as a whole.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RulePatch)]
#[expect(dead_code, reason = "describes a part of `RuleSpec` for the OpenAPI document")]
pub struct PatchDoc {
    #[schema(nullable = false)]
    r#match: Option<MatchDoc>,
    #[schema(nullable = false)]
    effect: Option<String>,
    #[schema(nullable = false)]
    admit_percent: Option<u8>,
    #[schema(nullable = false)]
    mode: Option<String>,
    #[schema(nullable = false)]
    reason: Option<String>,
    #[schema(nullable = false)]
    retry_after: Option<String>,
    /// RFC 3339; null takes the expiry away. A rule whose time is over can't be changed without a later one.
    expires_at: Option<String>,
    #[schema(nullable = false)]
    evict: Option<bool>,
    #[schema(nullable = false)]
    confirm: Option<bool>,
}

/// A rule as it is shown.
#[derive(Debug, Serialize)]
pub struct RuleView {
    pub id: RuleId,
    /// The fields of the rule: those of a [`RuleSpec`], or whatever a later version has stored.
    #[serde(flatten)]
    spec: Map<String, Value>,
    created_at: String,
    revision: u64,
    state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    hits: HitsView,
}

/// What a rule is to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = RuleState)]
pub enum State {
    /// It is in force, unless its time is over.
    Enforced,
    /// It is stored, and this version can't enforce it: it refuses nobody here.
    Unsupported,
    /// It is in force, and the database has lost it.
    Lost,
}

/// What a rule did.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
#[schema(as = RuleHits)]
pub struct HitsView {
    /// Connect attempts that it refused on this node, since the rule came into force here or the node was started.
    refused: u64,
    /// Sessions that it closed on this node, since then.
    evicted: u64,
    /// Devices that are connected to this node and match it now. Absent where it was not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    connected: Option<u64>,
}

/// A rule.
#[derive(ToSchema)]
#[schema(as = Rule)]
#[expect(
    dead_code,
    reason = "describes `RuleView` for the OpenAPI document; a test compares the two"
)]
pub struct RuleViewDoc {
    id: Uuid,
    r#match: MatchDoc,
    effect: String,
    admit_percent: u8,
    mode: String,
    reason: String,
    retry_after: String,
    expires_at: Option<String>,
    evict: bool,
    /// RFC 3339.
    created_at: String,
    /// Revision of all rules at which this one was changed last.
    revision: u64,
    /// With `unsupported`, the fields of the rule are those that the later version has stored.
    state: State,
    /// Why this version can't enforce it.
    problem: Option<String>,
    hits: HitsView,
}

impl RuleView {
    /// As this node enforces it.
    pub fn of(rule: &Rule, rules: &Rules) -> Self {
        let hits = rules.hits();
        let hits = hits.of(rule.id);
        let is_lost = rules.lost().iter().any(|lost| lost.rule.id == rule.id);
        Self {
            id: rule.id,
            spec: fields(&rule.spec_json()),
            created_at: format_time(rule.created_at),
            revision: rule.revision,
            state: if is_lost { State::Lost } else { State::Enforced },
            problem: None,
            hits: HitsView {
                refused: hits.map_or(0, Hits::refused),
                evicted: hits.map_or(0, Hits::evicted),
                connected: None,
            },
        }
    }

    /// Counts the devices that it matches.
    pub fn with_connected(mut self, connected: u64) -> Self {
        self.hits.connected = Some(connected);
        self
    }
}

impl From<&Unsupported> for RuleView {
    fn from(rule: &Unsupported) -> Self {
        let mut spec = fields(&rule.spec);
        // What is said of each rule is said by this node.
        spec.retain(|name, _| !SHOWN.contains(&name.as_str()));
        Self {
            id: rule.id,
            spec,
            created_at: format_time(rule.created_at),
            revision: rule.revision,
            state: State::Unsupported,
            problem: Some(rule.problem.clone()),
            hits: HitsView::default(),
        }
    }
}

/// Fields of a rule as it is shown that are not fields of its spec.
const SHOWN: [&str; 6] = ["id", "created_at", "revision", "state", "problem", "hits"];

fn fields(spec: &str) -> Map<String, Value> {
    serde_json::from_str(spec).unwrap_or_else(|_| {
        let mut fields = Map::new();
        fields.insert("stored".into(), spec.into());
        fields
    })
}

impl Asked {
    pub fn into_new(mut self, wall: WallTime) -> Result<(RuleSpec, bool), Problem> {
        let is_confirmed = self.take_confirm()?;
        Ok((spec(self.0, wall)?, is_confirmed))
    }

    pub fn into_change_of(mut self, before: &RuleSpec, wall: WallTime) -> Result<(RuleSpec, bool), Problem> {
        let is_confirmed = self.take_confirm()?;
        if self.0.is_empty() {
            return Err(Problem::invalid("name what should change"));
        }
        let Ok(Value::Object(mut fields)) = serde_json::to_value(before) else {
            return Err(Problem::invalid("the rule has no JSON form"));
        };
        fields.extend(self.0);
        Ok((spec(fields, wall)?, is_confirmed))
    }

    fn take_confirm(&mut self) -> Result<bool, Problem> {
        match self.0.remove("confirm") {
            None => Ok(false),
            Some(Value::Bool(is_confirmed)) => Ok(is_confirmed),
            Some(_) => Err(Problem::invalid("confirm: expected true or false")),
        }
    }
}

fn spec(fields: Map<String, Value>, wall: WallTime) -> Result<RuleSpec, Problem> {
    // Serde would also take an array of the values of its fields.
    if matches!(fields.get("match"), Some(Value::Array(_))) {
        return Err(Problem::invalid("match: expected an object"));
    }
    let spec: RuleSpec = serde_json::from_value(Value::Object(fields))
        .map_err(|error| Problem::invalid(shortened(&error.to_string())))?;
    spec.validate()
        .and_then(|()| spec.validate_expiry(wall))
        .map_err(|error| Problem::invalid(format!("{}: {error}", error.field())))?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use seawall_proto::rules::{Effect, Match};
    use utoipa::{
        PartialSchema as _,
        openapi::{RefOr, Schema},
    };

    use super::*;

    const NOW: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

    #[test]
    fn the_documented_fields_are_those_of_a_rule() {
        let minimal =
            serde_json::json!({"match": {"firmware": ">=3.8", "model": "m", "tenant": "t"}, "effect": "block"});
        let Value::Object(minimal) = minimal else { panic!() };
        let spec = spec(minimal, NOW).unwrap();
        let rule = Rule {
            id: RuleId(Uuid::nil()),
            spec: spec.clone(),
            created_at: WallTime::default(),
            revision: 1,
        };

        let mut body = keys(&serde_json::to_value(&spec).unwrap());
        body.push("confirm".into());
        body.sort();

        let home = tempfile::tempdir().unwrap();
        let mut shown = serde_json::to_value(RuleView::of(&rule, &Rules::open(home.path()))).unwrap();
        shown["problem"] = Value::Null;

        assert_eq!(documented(RuleDoc::schema()), body);
        assert_eq!(documented(PatchDoc::schema()), body);
        assert_eq!(documented(RuleViewDoc::schema()), keys(&shown));
        assert_eq!(
            documented(MatchDoc::schema()),
            keys(&serde_json::to_value(&spec.matches).unwrap())
        );
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let Value::Object(fields) = serde_json::json!({"match": {"model": "m"}, "effect": "block", "reason": "a", "expires_at": "2099-01-01T00:00:00Z"})
        else {
            panic!()
        };
        let before = spec(fields, NOW).unwrap();
        let asked = |json: Value| serde_json::from_value::<Asked>(json).unwrap();

        let (after, is_confirmed) = asked(serde_json::json!({"reason": "b", "expires_at": null, "confirm": true}))
            .into_change_of(&before, NOW)
            .unwrap();

        assert!(is_confirmed);
        assert_eq!((after.reason.as_str(), after.expires_at), ("b", None));
        assert_eq!(after.matches, before.matches);
        assert!(asked(serde_json::json!({})).into_change_of(&before, NOW).is_err());
        assert!(
            asked(serde_json::json!({"colour": 1}))
                .into_change_of(&before, NOW)
                .is_err()
        );
    }

    #[test]
    fn a_rule_that_is_over_is_changed_with_a_later_time_only() {
        let mut before = RuleSpec::new(Match::default(), Effect::Block);
        before.expires_at = Some(NOW);
        let change = |json: Value| {
            let asked = serde_json::from_value::<Asked>(json).unwrap();
            asked.into_change_of(&before, NOW).map(|(after, _)| after.expires_at)
        };

        assert!(change(serde_json::json!({"reason": "b"})).is_err());
        assert_eq!(change(serde_json::json!({"expires_at": null})).unwrap(), None);
        assert!(change(serde_json::json!({"expires_at": "2099-01-01T00:00:00Z"})).unwrap() > Some(NOW));
    }

    fn keys(json: &Value) -> Vec<String> {
        let mut keys: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    }

    fn documented(schema: RefOr<Schema>) -> Vec<String> {
        keys(&serde_json::to_value(schema).unwrap()["properties"])
    }
}
