//! Authentication and authorization: the `Authorization` header of a request, as an extractor that each handler names.
//!
//! A handler without a [`Caller`] would be open to every client. A test calls every path of the OpenAPI document to
//! find one.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};

use seawall_proto::id::SecretHash;
use uuid::Uuid;

use super::{
    Api,
    call::Call,
    problem::{Code, Problem},
};
use crate::{
    store::{Audit, Role},
    tokens::{Principal, Tokens},
};

/// The minimum role that a call needs.
pub trait AtLeast: Send + Sync {
    const ROLE: Role;
}

/// May read.
#[derive(Debug)]
pub enum Viewer {}

/// May also change rules, drain, disconnect devices and send them messages.
#[derive(Debug)]
pub enum Operator {}

/// May also manage devices and tokens.
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

/// A caller whose token has at least the role `R`.
#[derive(Debug)]
pub struct Caller<R> {
    principal: Principal,
    token: SecretHash,
    call: Option<Arc<Call>>,
    role: PhantomData<fn() -> R>,
}

impl<R: AtLeast> Caller<R> {
    /// Whether the caller's token is still valid for this call. Long calls check it again.
    pub fn is_allowed(&self, tokens: &Tokens) -> bool {
        tokens
            .principal(&self.token)
            .is_some_and(|principal| principal.role >= R::ROLE)
    }
}

impl<R> Caller<R> {
    /// Returns the audit data of a change that this caller makes now.
    pub fn audit(&self, api: &Api, action: &'static str) -> Audit {
        if let Some(call) = &self.call {
            call.set_action(action);
        }
        Audit {
            id: Uuid::now_v7(),
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
                    "the call needs the role {}, and the token has {}",
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

/// Returns the one bearer token of a request.
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
