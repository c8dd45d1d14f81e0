//! `seawall tokens`: access tokens for the API.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Context, Failure, client::Method, table};

/// Maximum number of tokens that are requested.
const TOKENS_MAX: usize = 10_000;
/// Minimum length of the beginning or end of an id that is accepted.
const PART_LEN_MIN: usize = 4;
const PATH: &str = "/api/v1/tokens";

#[derive(Debug, Subcommand)]
pub enum Tokens {
    /// Create a token, which is shown this once; no two valid tokens have the same name
    Create {
        /// Owner or purpose
        name: String,
        /// viewer reads; operator also changes rules, drains and disconnects; admin also manages devices and tokens
        #[arg(long, value_parser = ["viewer", "operator", "admin"])]
        role: String,
    },
    /// Every token, without its secret
    List,
    /// Revoke a token
    Revoke {
        /// Id of the token, its beginning or end (4 characters at least), or its name
        #[arg(value_name = "ID|NAME")]
        token: String,
    },
}

pub fn run(ctx: &Context, verb: Tokens) -> Result<(), Failure> {
    match verb {
        Tokens::Create { name, role } => {
            let answer = ctx
                .client
                .send(Method::Post, PATH, Some(&json!({"name": name, "role": role})))?;
            ctx.show(&answer, |answer| {
                table::facts(&[
                    ("id", table::at(answer, "id")),
                    ("name", table::at(answer, "name")),
                    ("role", table::at(answer, "role")),
                    ("token", table::at(answer, "token")),
                ])
            })
        }
        Tokens::List => ctx.show(&ctx.client.list(PATH, &[], TOKENS_MAX)?, |answer| {
            table::items(
                answer,
                &[
                    ("ID", "id"),
                    ("NAME", "name"),
                    ("ROLE", "role"),
                    ("CREATED", "created_at"),
                    ("REVOKED", "revoked_at"),
                ],
            )
        }),
        Tokens::Revoke { token } => {
            // A whole id needs no list.
            let (id, name) = match token.parse::<uuid::Uuid>() {
                Ok(id) => (id.to_string(), None),
                Err(_) => {
                    let found = find(&ctx.client.list(PATH, &[], TOKENS_MAX)?, &token)?;
                    (table::at(&found, "id"), Some(table::at(&found, "name")))
                }
            };
            ctx.client.send(Method::Delete, &format!("{PATH}/{id}"), None)?;
            ctx.show(&json!({ "revoked": id }), |_| match &name {
                Some(name) => format!("revoked {id} ({name})\n"),
                None => format!("revoked {id}\n"),
            })
        }
    }
}

/// Finds the one valid token that the operator named.
fn find(tokens: &Value, named: &str) -> Result<Value, Failure> {
    let lower = named.to_ascii_lowercase();
    let text = |token: &Value, key: &str| token.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let valid = || table::list(tokens).iter().filter(|token| token["revoked_at"].is_null());
    let has_part = |token: &&Value| {
        let id = text(token, "id");
        lower.len() >= PART_LEN_MIN && (id.starts_with(&lower) || id.ends_with(&lower))
    };
    let mut found: Vec<&Value> = valid().filter(|token| text(token, "name") == named).collect();
    if found.is_empty() {
        found = valid().filter(has_part).collect();
    }
    match found.as_slice() {
        [token] => Ok((*token).clone()),
        [] => Err(Failure::failed(format!(
            "no valid token has the id or the name {named}"
        ))),
        several => Err(Failure::failed(format!(
            "{} valid tokens match {named}: name one by its whole id, as seawall tokens list shows it",
            several.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_found_by_its_name_or_by_a_part_of_its_id_that_no_other_has() {
        let tokens = json!({"items": [
            {"id": "01a2aaaa-0000-7000-8000-00000000beef", "name": "ci", "revoked_at": null},
            {"id": "01a2bbbb-0000-7000-8000-00000000cafe", "name": "ops", "revoked_at": null},
            {"id": "01a2cccc-0000-7000-8000-00000000feed", "name": "ci", "revoked_at": "2026-01-01T00:00:00Z"},
        ]});
        let found = |named| find(&tokens, named).map(|token| table::at(&token, "name")).ok();

        assert_eq!(found("ci").as_deref(), Some("ci"), "the revoked one is ignored");
        assert_eq!(found("01A2BBBB").as_deref(), Some("ops"));
        assert_eq!(found("cafe").as_deref(), Some("ops"));
        for ambiguous_or_unknown in ["01a2", "afe", "feed", "nobody"] {
            assert_eq!(found(ambiguous_or_unknown), None, "{ambiguous_or_unknown}");
        }
    }
}
