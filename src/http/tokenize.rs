//! `POST /tokenize` and `/detokenize`.

use super::answer::token_name;
use super::chat::render;
use super::error::ApiError;
use super::prepare::{check_model, prepared};
use super::read::Body;
use super::{App, Service};
use crate::types::TokenId;
use crate::wire::{DetokenizeRequest, DetokenizeResponse, TokenizeInput, TokenizeRequest, TokenizeResponse};
use axum::Json;
use axum::extract::State;

pub(super) async fn tokenize(State(service): App, Body(body): Body) -> Result<Json<TokenizeResponse>, ApiError> {
    prepared(move || tokens_of(&service, &body).map(Json)).await
}

fn tokens_of(service: &Service, body: &[u8]) -> Result<TokenizeResponse, ApiError> {
    let request = TokenizeRequest::parse(body)?;
    let generate = service.generate.as_ref();
    check_model(request.model.as_ref(), generate)?;
    let text = match request.input {
        TokenizeInput::Text(text) => text,
        TokenizeInput::Chat(chat) => render(service, &chat)?,
    };
    let tokens =
        generate.encode(&text, request.add_special_tokens).map_err(|e| ApiError::invalid(Some("prompt"), e))?;
    let token_strs = request.return_token_strs.then(|| tokens.iter().map(|id| token_name(generate, *id)).collect());
    let max_model_len = generate.info().limits.max_model_len;
    Ok(TokenizeResponse { count: tokens.len(), tokens, max_model_len, token_strs })
}

pub(super) async fn detokenize(State(service): App, Body(body): Body) -> Result<Json<DetokenizeResponse>, ApiError> {
    prepared(move || text_of(&service, &body).map(Json)).await
}

fn text_of(service: &Service, body: &[u8]) -> Result<DetokenizeResponse, ApiError> {
    let request = DetokenizeRequest::parse(body)?;
    let generate = service.generate.as_ref();
    check_model(request.model.as_ref(), generate)?;
    let limits = &generate.info().limits;
    let refuse = |message: String| Err(ApiError::invalid(Some("tokens"), message));
    let known = |id: &&TokenId| (**id as usize) < limits.vocab;
    if let Some(id) = request.tokens.iter().find(|id| !known(id)) {
        return refuse(format!("tokens holds id {id}; ids of this model are 0 to {}", limits.vocab - 1));
    }
    if request.tokens.len() > limits.max_model_len {
        let (n, max) = (request.tokens.len(), limits.max_model_len);
        return refuse(format!("tokens has {n} ids, but the context of this model is {max}"));
    }
    Ok(DetokenizeResponse { prompt: generate.pieces(&request.tokens, false).concat() })
}
