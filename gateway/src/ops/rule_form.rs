//! Rules in the API: as requests have them, and as answers show them.
//!
//! `seawall_proto` defines the fields of a rule. The `…Doc` types describe them for the OpenAPI document, and a test
//! compares the two.

use seawall_proto::{
    hello::IdentityNames,
    id::RuleId,
    rollout::Plan,
    rules::{Mode, Rule, RuleSpec, Unsupported},
    time::WallTime,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    devices::not_a_device,
    problem::{Problem, shortened},
    rollouts::{self, PlanDoc},
};
use crate::fleet::rules::{Rules, hits::Hit};

/// A rule of a request: the fields of a rule, and `confirm`.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct RuleRequest(Map<String, Value>);

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
    /// What happens to the devices. `block`: they are refused. `restrict`: they get an anonymous session with one
    /// `update` frame, and are closed. `throttle`: they connect at a rate of their own. Of several rules the strictest
    /// applies, in this order.
    #[schema(pattern = "^(block|restrict|throttle)$")]
    effect: String,
    /// Share of the matched devices that the rule lets through, in percent. Always the same devices: raising it refuses
    /// nobody who was let through.
    #[schema(nullable = false, default = 0, maximum = 100)]
    admit_percent: Option<u8>,
    /// `enforce`, or `dry_run`: the rule counts the attempts that it would apply to, and does nothing else.
    #[schema(nullable = false, default = "enforce", pattern = "^(enforce|dry_run)$")]
    mode: Option<String>,
    /// Public: refused devices receive it. At most 256 bytes, no control characters.
    #[schema(nullable = false)]
    reason: Option<String>,
    /// Refused devices reconnect after this time at least, and twice this time at most. 1 second to 7 days.
    #[schema(nullable = false, default = "15m")]
    retry_after: Option<String>,
    /// When the rule ends; not in the past. RFC 3339.
    expires_at: Option<String>,
    /// Also close live sessions that match, at a pace.
    #[schema(nullable = false, default = false)]
    evict: Option<bool>,
    /// Needed by effect `restrict`, and not allowed with others. Public: what the devices are told. At most 4 KiB.
    #[schema(value_type = Option<Object>)]
    update: Option<Map<String, Value>>,
    /// With effect `throttle` only: connect attempts per second that each node lets through. Default: a twentieth of
    /// the lookups per second that the database is known to answer.
    #[schema(minimum = 1, maximum = 100_000)]
    rate_per_second: Option<u32>,
    /// Devices that the rule never applies to, by id. At most 1,000.
    #[schema(nullable = false, max_items = 1_000)]
    allow: Option<Vec<String>>,
    /// Confirms a rule that refuses over 30 % of the connected devices.
    #[schema(nullable = false, default = false)]
    confirm: Option<bool>,
    /// Enforce the rule in stages: on a growing share of the devices that it matches.
    #[schema(nullable = false)]
    rollout: Option<PlanDoc>,
}

/// The devices that a rule matches: every given field must match.
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

/// Changes of a rule. Fields that are not given stay as they are. `match` is replaced as a whole.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RulePatch)]
#[expect(dead_code, reason = "describes a part of `RuleSpec` for the OpenAPI document")]
pub struct PatchDoc {
    #[schema(nullable = false)]
    r#match: Option<MatchDoc>,
    #[schema(nullable = false)]
    effect: Option<String>,
    #[schema(nullable = false, maximum = 100)]
    admit_percent: Option<u8>,
    #[schema(nullable = false, pattern = "^(enforce|dry_run)$")]
    mode: Option<String>,
    #[schema(nullable = false)]
    reason: Option<String>,
    #[schema(nullable = false)]
    retry_after: Option<String>,
    /// RFC 3339; null removes the expiry. A change of an expired rule needs a later time.
    expires_at: Option<String>,
    #[schema(nullable = false)]
    evict: Option<bool>,
    /// Null removes it: effects other than `restrict` have none.
    #[schema(value_type = Option<Object>)]
    update: Option<Map<String, Value>>,
    /// Null removes it: effects other than `throttle` have none.
    #[schema(minimum = 1, maximum = 100_000)]
    rate_per_second: Option<u32>,
    /// Replaces the list; empty removes it.
    #[schema(nullable = false, max_items = 1_000)]
    allow: Option<Vec<String>>,
    #[schema(nullable = false)]
    confirm: Option<bool>,
}

/// A rule of an answer.
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

/// The state of a rule on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = RuleState)]
pub enum State {
    /// It is in force until it expires.
    Enforced,
    /// It counts what it would do until it expires.
    DryRun,
    /// It is over: it matches nothing.
    Expired,
    /// It is stored, and this version can't enforce it: it refuses no device here.
    Unsupported,
    /// It is in force, and the database has lost it.
    Lost,
    /// It is in force on this node, and waits in its journal for the database.
    Local,
}

/// Effects of a rule.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
#[schema(as = RuleHits)]
pub struct HitsView {
    /// Connect attempts that it has refused on this node, since it came into force here or the node started.
    refused: u64,
    /// Restricted sessions that it has given on this node, since then.
    restricted: u64,
    /// Connect attempts that it has throttled on this node, since then.
    throttled: u64,
    /// Sessions that it has closed on this node, since then.
    evicted: u64,
    /// Connect attempts on this node that it would have applied to in dry-run mode, since then.
    dry_run: u64,
    /// Matching devices with a session on this node. Absent if they were not counted.
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
    /// Absent without one.
    #[schema(value_type = Option<Object>, nullable = false)]
    update: Option<Map<String, Value>>,
    /// Absent if the rule sizes itself, and with other effects.
    #[schema(nullable = false)]
    rate_per_second: Option<u32>,
    /// Absent if it is empty.
    #[schema(nullable = false)]
    allow: Option<Vec<Uuid>>,
    /// RFC 3339.
    created_at: String,
    /// Revision of the rule set at the last change of this rule.
    revision: u64,
    /// With `unsupported`, the fields of the rule are as the later version has stored them.
    state: State,
    /// Why this version can't enforce it.
    problem: Option<String>,
    hits: HitsView,
}

impl RuleView {
    /// As this node enforces it.
    pub fn of(rule: &Rule, rules: &Rules, wall: WallTime) -> Self {
        let hits = rules.hits();
        let count = |hit| hits.of(rule.id).map_or(0, |hits| hits.get(hit));
        let is_lost = rules.lost().iter().any(|lost| lost.rule.id == rule.id);
        Self {
            id: rule.id,
            spec: fields(&rule.spec_json()),
            created_at: rule.created_at.to_rfc3339(),
            revision: rule.revision,
            state: match (rules.local().has(rule.id), is_lost, rule.spec.mode) {
                _ if rule.is_expired(wall) => State::Expired,
                (true, ..) => State::Local,
                (false, true, _) => State::Lost,
                (false, false, Mode::Enforce) => State::Enforced,
                (false, false, Mode::DryRun) => State::DryRun,
            },
            problem: None,
            hits: HitsView {
                refused: count(Hit::Refused),
                restricted: count(Hit::Restricted),
                throttled: count(Hit::Throttled),
                evicted: count(Hit::Evicted),
                dry_run: count(Hit::DryRun),
                connected: None,
            },
        }
    }

    /// It waits in the journal, whatever has happened since.
    pub fn local(mut self) -> Self {
        self.state = State::Local;
        self
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
        // These fields are this node's.
        spec.retain(|name, _| !SHOWN.contains(&name.as_str()));
        Self {
            id: rule.id,
            spec,
            created_at: rule.created_at.to_rfc3339(),
            revision: rule.revision,
            state: State::Unsupported,
            problem: Some(rule.problem.clone()),
            hits: HitsView::default(),
        }
    }
}

/// Fields of a rule in answers that are not fields of its spec.
const SHOWN: [&str; 6] = ["id", "created_at", "revision", "state", "problem", "hits"];

fn fields(spec: &str) -> Map<String, Value> {
    serde_json::from_str(spec).unwrap_or_else(|_| {
        let mut fields = Map::new();
        fields.insert("stored".into(), spec.into());
        fields
    })
}

impl RuleRequest {
    /// `names`: how devices without a UUID are named.
    pub fn into_new(mut self, names: &IdentityNames, wall: WallTime) -> Result<(RuleSpec, bool), Problem> {
        let is_confirmed = self.take_confirm()?;
        self.resolve_allowed(names)?;
        Ok((spec(self.0, wall)?, is_confirmed))
    }

    pub fn into_change_of(
        mut self,
        before: &RuleSpec,
        names: &IdentityNames,
        wall: WallTime,
    ) -> Result<(RuleSpec, bool), Problem> {
        let is_confirmed = self.take_confirm()?;
        self.resolve_allowed(names)?;
        if self.0.is_empty() {
            return Err(Problem::invalid("give at least one field to change"));
        }
        let Ok(Value::Object(mut fields)) = serde_json::to_value(before) else {
            return Err(Problem::invalid("the rule has no JSON form"));
        };
        fields.extend(self.0);
        Ok((spec(fields, wall)?, is_confirmed))
    }

    /// Replaces the devices of `allow` by their UUIDs.
    fn resolve_allowed(&mut self, names: &IdentityNames) -> Result<(), Problem> {
        let Some(Value::Array(allowed)) = self.0.get_mut("allow") else {
            return Ok(());
        };
        for device in allowed {
            let text = device.as_str();
            let named = text.and_then(|text| names.device(text)).ok_or_else(|| {
                let text = text.map_or_else(|| device.to_string(), str::to_owned);
                Problem::invalid(shortened(&format!(
                    "allow: `{text}`: {}",
                    not_a_device(names).trim_start_matches("id: ")
                )))
            })?;
            *device = named.id.to_string().into();
        }
        Ok(())
    }

    /// Takes the plan of a rule that is to be enforced in stages.
    pub fn take_rollout(&mut self) -> Result<Option<Plan>, Problem> {
        let Some(plan) = self.0.remove("rollout") else {
            return Ok(None);
        };
        if !plan.is_object() {
            return Err(Problem::invalid("rollout: expected an object"));
        }
        let plan: Plan = serde_path_to_error::deserialize(plan)
            .map_err(|error| Problem::invalid(format!("rollout: {}", shortened(&error.to_string()))))?;
        plan.validate().map_err(rollouts::invalid)?;
        Ok(Some(plan))
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
    // Its errors name the field.
    let spec: RuleSpec = serde_path_to_error::deserialize(Value::Object(fields))
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
        let minimal = serde_json::json!({"match": {"firmware": ">=3.8", "model": "m", "tenant": "t"}, "effect": "restrict", "update": {}, "allow": [Uuid::nil()]});
        let Value::Object(minimal) = minimal else { panic!() };
        let mut spec = spec(minimal, NOW).unwrap();
        // No rule has it beside an update.
        spec.rate_per_second = Some(1);
        let rule = Rule {
            id: RuleId(Uuid::nil()),
            spec: spec.clone(),
            created_at: WallTime::default(),
            revision: 1,
        };

        let mut body = keys(&serde_json::to_value(&spec).unwrap());
        body.push("confirm".into());
        body.sort();
        let mut new = body.clone();
        new.push("rollout".into());
        new.sort();

        let home = tempfile::tempdir().unwrap();
        let mut shown = serde_json::to_value(RuleView::of(&rule, &Rules::open(home.path()), NOW)).unwrap();
        shown["problem"] = Value::Null;

        assert_eq!(documented(RuleDoc::schema()), new);
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
        let request = |json: Value| serde_json::from_value::<RuleRequest>(json).unwrap();

        let (after, is_confirmed) = request(serde_json::json!({"reason": "b", "expires_at": null, "confirm": true}))
            .into_change_of(&before, &IdentityNames::default(), NOW)
            .unwrap();

        assert!(is_confirmed);
        assert_eq!((after.reason.as_str(), after.expires_at), ("b", None));
        assert_eq!(after.matches, before.matches);
        for nothing in [serde_json::json!({}), serde_json::json!({"colour": 1})] {
            let changed = request(nothing).into_change_of(&before, &IdentityNames::default(), NOW);
            assert!(changed.is_err());
        }
    }

    #[test]
    fn a_rule_that_is_over_is_changed_with_a_later_time_only() {
        let mut before = RuleSpec::new(Match::default(), Effect::Block);
        before.expires_at = Some(NOW);
        let change = |json: Value| {
            let request = serde_json::from_value::<RuleRequest>(json).unwrap();
            let changed = request.into_change_of(&before, &IdentityNames::default(), NOW);
            changed.map(|(after, _)| after.expires_at)
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
