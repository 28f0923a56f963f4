// One column of the playground: a text or a conversation, and how fast it came.

import { ApiError } from "./api.js";
import { duration, element } from "./dom.js";
import { entriesOf, onTokenKey, tokenElement } from "./tokens.js";

export class Pane {
  constructor(output, figures) {
    this.output = output;
    this.figures = figures;
    output.addEventListener("keydown", onTokenKey);
    this.clear();
  }

  clear() {
    this.messages = [];
    this.document = "";
    this.output.replaceChildren();
    this.figures.textContent = "";
  }

  // Whether there is anything to go on with when nothing is said.
  get canGoOn() {
    return this.document !== "";
  }

  // What the request is, and where its answer goes.
  begin(isChat, text) {
    this.output.querySelectorAll(".error").forEach((node) => node.remove());
    this.output.setAttribute("aria-busy", "true");
    this.speed = new Speed(this.figures);
    this.isAnswered = false;
    return isChat ? this.beginTurn(text) : this.beginText(text);
  }

  beginText(text) {
    if (text !== "") {
      this.document = text;
      this.output.replaceChildren(element("span", "given", text));
    }
    this.answer = element("span", "made");
    this.output.append(this.answer);
    this.settle = () => {};
    return { path: "/v1/completions", body: { prompt: this.document } };
  }

  beginTurn(text) {
    const question = turn("user", text);
    const reply = turn("assistant", "");
    this.messages.push({ role: "user", content: text });
    const body = { messages: [...this.messages] };
    this.output.append(question, reply);
    this.answer = reply.querySelector("p");
    this.document = "";
    this.settle = () => {
      if (this.isAnswered) {
        this.messages.push({ role: "assistant", content: this.document });
        return;
      }
      // Nothing was answered: as if it had not been asked.
      this.messages.pop();
      question.remove();
      reply.remove();
    };
    return { path: "/v1/chat/completions", body };
  }

  // Take in one event of the stream.
  take(event) {
    this.speed.note(event);
    for (const choice of event.choices) {
      const text = choice.text ?? choice.delta.content ?? "";
      const entries = entriesOf(choice.logprobs);
      this.document += text;
      this.isAnswered ||= text !== "";
      this.answer.append(entries.length && text ? tokenElement(text, entries) : text);
    }
    this.scrollDown();
  }

  fail(error) {
    if (error.name === "AbortError") {
      this.speed.stopped();
      return;
    }
    const message = error instanceof ApiError ? error.message : "The server cannot be reached.";
    this.output.append(element("p", "error", message));
    this.figures.textContent = "";
    this.scrollDown();
  }

  // The answer is over; whether there was one.
  end() {
    this.settle();
    this.output.setAttribute("aria-busy", "false");
    const first = this.output.querySelector(".token");
    if (first && !this.output.querySelector(".token[tabindex='0']")) first.tabIndex = 0;
    return this.isAnswered;
  }

  scrollDown() {
    this.output.scrollTop = this.output.scrollHeight;
  }
}

function turn(role, text) {
  const who = element("span", "role", role === "user" ? "You" : "Model");
  return element("div", `turn ${role}`, who, element("p", "", text));
}

// Time to the first token, then tokens a second over those that followed it.
class Speed {
  constructor(node) {
    this.node = node;
    this.start = performance.now();
    this.first = null;
    this.tokens = 0;
    this.reason = "";
    node.textContent = "waiting";
  }

  note(event) {
    const now = performance.now();
    if (event.usage) this.tokens = event.usage.completion_tokens;
    for (const choice of event.choices) {
      this.first ??= now;
      this.last = now;
      this.tokens += 1;
      this.reason = choice.finish_reason ?? "";
    }
    this.show();
  }

  stopped() {
    this.reason = "stopped";
    this.show();
  }

  show() {
    if (this.first === null) {
      this.node.textContent = this.reason;
      return;
    }
    const parts = [`first token ${duration(this.first - this.start)}`, `${this.tokens} tokens`];
    const span = this.last - this.first;
    if (this.tokens > 1 && span > 0) {
      parts.push(`${(((this.tokens - 1) * 1000) / span).toFixed(0)} tokens/s`);
    }
    if (this.reason) parts.push(this.reason);
    this.node.textContent = parts.join("  ·  ");
  }
}
