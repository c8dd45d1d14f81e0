//! Who asks, and whether they may: the `Authorization` header of a request, as an extractor that each handler names.
//!
//! A handler without a [`Caller`] would be open to everybody; a test walks the OpenAPI document and finds it.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};

use seawall_proto::id::SecretHash;

use super::{
    Api,
    call::Call,
    problem::{Code, Problem},
};
use crate::{
    store::{Audit, Role},
    tokens::{Principal, Tokens},
};

/// The least role that a call asks for.
pub trait AtLeast: Send + Sync {
    const ROLE: Role;
}

/// Reads.
#[derive(Debug)]
pub enum Viewer {}

/// Also changes rules, drains, disconnects devices and sends them messages.
#[derive(Debug)]
pub enum Operator {}

/// Also manages devices and tokens.
#[derive(Debug)]
pub enum Admin {}

impl AtLeast for Viewer {
    const ROLE: Role = Role::Viewer;
}

impl AtLeast for Operator {
    const ROLE: Role = Role::Operator;
}

impl AtLeast for Admin {
    const ROLE: Role = Role::Admin;
}

/// Somebody whose token has at least the role `R`.
#[derive(Debug)]
pub struct Caller<R> {
    principal: Principal,
    token: SecretHash,
    call: Option<Arc<Call>>,
    role: PhantomData<fn() -> R>,
}

impl<R: AtLeast> Caller<R> {
    /// Whether the caller's token is still valid for this: what goes on for long asks again.
    pub fn is_allowed(&self, tokens: &Tokens) -> bool {
        tokens
            .principal(&self.token)
            .is_some_and(|principal| principal.role >= R::ROLE)
    }
}

impl<R> Caller<R> {
    /// What the audit log will say of a change that this caller makes now.
    pub fn audit(&self, api: &Api, action: &'static str) -> Audit {
        if let Some(call) = &self.call {
            call.set_action(action);
        }
        Audit {
            at: api.state.clock.wall(),
            actor: self.principal.name.as_ref().to_owned(),
            action,
        }
    }
}

impl<R: AtLeast> FromRequestParts<Arc<Api>> for Caller<R> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let token = SecretHash::of(bearer(&parts.headers)?.as_bytes());
        let Some(principal) = api.state.tokens.principal(&token) else {
            return Err(Problem::new(Code::Unauthorized, "the token is not valid"));
        };
        let call = parts.extensions.get::<Arc<Call>>().cloned();
        if let Some(call) = &call {
            call.authenticated(&principal.name)?;
        }
        if principal.role < R::ROLE {
            return Err(Problem::new(
                Code::Forbidden,
                format!(
                    "this needs the role {}, and the token has {}",
                    R::ROLE.as_str(),
                    principal.role.as_str()
                ),
            ));
        }
        Ok(Self {
            principal,
            token,
            call,
            role: PhantomData,
        })
    }
}

/// The one bearer token of a request.
fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let missing = || Problem::new(Code::Unauthorized, "expected Authorization: Bearer TOKEN");
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(missing());
    };
    let (scheme, token) = value
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .ok_or_else(missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(missing());
    }
    Ok(token.trim())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_one_bearer_token_counts() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            headers
        };

        assert_eq!(bearer(&headers(&["bearer  abc "])).unwrap(), "abc");
        for refused in [&[][..], &["Bearer a", "Bearer b"], &["Basic abc"], &["Bearer"]] {
            assert!(bearer(&headers(refused)).is_err(), "{refused:?}");
        }
    }
}
