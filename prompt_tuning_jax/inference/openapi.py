"""Describes the service's HTTP interface as an OpenAPI 3.1 document."""

from typing import Any

from prompt_tuning_jax.inference.requests import MAX_LABELS, METHODS

TEXT, NUMBER = {"type": "string"}, {"type": "number"}
ROW = {
    "type": "object",
    "required": ["inputs"],
    "additionalProperties": False,
    "properties": {
        "prompt": {"type": ["string", "null"], "description": "A prompt's name; null for the base model alone."},
        "inputs": {"type": "string", "description": "The text. If it is too long, its end is cut off."},
        "labels": {
            "type": "array",
            "items": TEXT,
            "minItems": 1,
            "maxItems": MAX_LABELS,
            "description": "Answers to rank; nothing is generated.",
        },
        "decode": {"enum": list(METHODS), "description": "How the answer is generated; greedy if it is left out."},
        "temperature": {"type": "number", "minimum": 0, "maximum": 100, "description": 'For "sample"; 0 is greedy.'},
        "top_k": {"type": "integer", "minimum": 0, "description": 'For "sample": draw from so many tokens; 0: all.'},
        "top_p": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": 'For "sample": draw from the likeliest tokens of this share of probability.',
        },
        "seed": {
            "type": "integer",
            "minimum": 0,
            "maximum": 2**32 - 1,
            "description": 'For "sample"; the row\'s number in the request if it is left out.',
        },
        "id": {"description": "Yours: it comes back as it is."},
        "note": {"description": "Yours: it comes back as it is."},
        "targets": {"description": "Yours: it comes back as it is."},
    },
}
ANSWER = {
    "type": "object",
    "description": "The row's fields, and its answer.",
    "properties": {
        "prediction": {"type": "string", "description": "What was generated, or the best label."},
        "score": {"type": "number", "description": "Its log-probability."},
        "scores": {"type": "object", "additionalProperties": NUMBER, "description": "Of each label."},
        "probabilities": {"type": "object", "additionalProperties": NUMBER, "description": "Of each label; sum 1."},
        "cut": {"type": "boolean", "description": "True if the end of the inputs was cut off."},
        "error": {"type": "string", "description": "Why there is no answer."},
    },
}
PROMPTS = {
    "base": {"type": "string", "description": "The base model's name."},
    "fingerprint": {"type": "string", "description": "The base model's fingerprint."},
    "prompts": {"type": "object", "additionalProperties": {"type": "integer"}, "description": "Positions by name."},
    "broken": {"type": "object", "additionalProperties": TEXT, "description": "What is wrong, by name."},
    "folder": {"type": "string", "description": "What is wrong with the folder of prompts."},
}
ERRORS = {
    400: "The request is none.",
    401: "The API key is missing or wrong.",
    408: "The body took too long.",
    413: "The body, the rows or their tokens are too many.",
    415: "The content type is not application/json.",
    421: "The Host header names another machine.",
    429: "Too much waits already.",
    503: "The base model loads, the model fails, or the answer took too long.",
}


def openapi_document(max_rows: int) -> dict[str, Any]:
    """Returns the OpenAPI document.

    Args:
      max_rows: the largest number of rows of a request.
    """

    def error(status: int) -> dict[str, Any]:
        return {"description": ERRORS[status], "content": _json({"error": TEXT})}

    def get(summary: str, content: dict[str, Any], *errors: int, open_to_all: bool = False) -> dict[str, Any]:
        answers = {"200": {"description": summary, "content": content}}
        answers |= {str(status): error(status) for status in (*(() if open_to_all else (401,)), 421, *errors)}
        return {"get": {"summary": summary, "responses": answers} | ({"security": []} if open_to_all else {})}

    rows = {"type": "array", "maxItems": max_rows, "items": {"$ref": "#/components/schemas/Row"}}
    answers = {"type": "array", "items": {"$ref": "#/components/schemas/Answer"}}
    predict = {
        "summary": "Answers rows, in order. A row that cannot be answered has an error.",
        "requestBody": {"required": True, "content": _json({"rows": rows}, required=["rows"])},
        "responses": {"200": {"description": "The answers.", "content": _json({"rows": answers})}}
        | {str(status): error(status) for status in ERRORS},
    }
    probe = _json({"status": TEXT})
    ready = "503 while the base model loads, and while one pass of the model takes longer than a request may."
    plain = {"text/plain": {"schema": TEXT}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "prompt_tuning_jax", "version": "1", "description": "Rows of many prompts, one base model."},
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/predict": {"post": predict},
            "/v1/prompts": get("The prompts there are, and those that are broken.", _json(PROMPTS), 503),
            "/livez": get("503 if the service cannot recover and should be restarted.", probe, 503, open_to_all=True),
            "/readyz": get(ready, probe, 503, open_to_all=True),
            "/healthz": get("The same as /readyz.", probe, 503, open_to_all=True),
            "/metrics": get("Counters for Prometheus.", plain),
            "/openapi.json": get("This document.", {"application/json": {"schema": {"type": "object"}}}),
        },
        "components": {
            "schemas": {"Row": ROW, "Answer": ANSWER},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _json(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object", "properties": properties} | more}}
